"""The dense side of the cut: announce a batch, execute it, merge partial attention."""
