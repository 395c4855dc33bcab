"""From an inventory of machines to candidates and a plan file."""
