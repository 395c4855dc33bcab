"""Layers that keep a state instead of KV: linear attention, the delta rule and state spaces."""
