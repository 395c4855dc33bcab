"""The two kinds of worker: dense layers on one side of the cut, KV cache and attention on the other."""
