"""Files, child processes, this machine, progress, pictures."""
