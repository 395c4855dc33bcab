"""Between text and tokens, and what text may come next."""
