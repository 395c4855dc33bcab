"""Attention over sets of keys, and the merge of what comes out."""
