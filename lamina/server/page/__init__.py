"""The built-in page and its data; its files are in `static/`."""
