"""Attention over sets of keys, and the merge of what comes out. Knows no policy, no sequence, no model."""
