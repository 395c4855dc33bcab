"""The same costs in closed form."""
