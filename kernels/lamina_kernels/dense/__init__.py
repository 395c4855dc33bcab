"""The dense operations of decode steps on CPUs."""
