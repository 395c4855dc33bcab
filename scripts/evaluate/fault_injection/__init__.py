"""What clients of `lamina serve` notice of a fault: scenarios as data, run on real processes under a real load."""
