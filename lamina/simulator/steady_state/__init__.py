"""The yield of a system in closed form."""
