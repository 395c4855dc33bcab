"""Sketches of pages: what a page's keys are like, in a sixth of their bytes."""
