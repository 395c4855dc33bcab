"""Pages of KV in memory and in files: the store, its parts, what is evicted."""
