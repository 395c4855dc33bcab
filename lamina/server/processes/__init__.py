"""The supervisor, its child processes, and what they say to each other."""
