"""The step loop, and what works on its thread."""
