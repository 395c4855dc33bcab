"""How a process ends, and its credentials."""
