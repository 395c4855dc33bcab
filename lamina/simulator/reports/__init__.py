"""Results as tables, a page and charts."""
