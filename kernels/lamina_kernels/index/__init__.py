"""The choice of keys by a layer's own index."""
