"""Models that Lamina has no class for and transformers has: cut at attention by their own code."""
