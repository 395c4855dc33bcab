"""What a model is, read from its config.json and checked. Loads no torch."""
