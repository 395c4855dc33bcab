"""Attention over pages on CPUs: lists of pages, compiled loops, shares of work, merges."""
