"""From a model's name to a folder of its files."""
