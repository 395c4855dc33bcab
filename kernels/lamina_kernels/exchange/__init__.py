"""A decode step's exchange between both sides of the cut without Python."""
