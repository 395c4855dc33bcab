"""One shard of the KV cache: append, attend, free."""
