"""KV policies: what each KV head's queries read, and what is kept for them. One small file a policy."""
