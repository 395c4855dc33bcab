"""Indexes over the keys of one layer and KV head: which keys have the largest inner products with a step's queries."""
