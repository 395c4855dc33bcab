"""Sketches of pages: an estimate of a page's keys in a sixth of their bytes."""
