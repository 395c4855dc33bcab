"""What KV policies cost in quality: texts and tasks for long contexts, and measures beside the full cache."""
