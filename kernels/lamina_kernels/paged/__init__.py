"""Pages of KV, which keys a query reads, and equal shares of that work."""
