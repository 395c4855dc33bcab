"""Weights out of files: safetensors, GGUF, quantised tensors."""
