"""The version of Lamina. It imports nothing, so that any file may import it."""

__version__ = "0.1.0"
