"""What crosses between callers and an engine: requests, outputs, snapshots, and their encoding."""
