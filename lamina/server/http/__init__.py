"""What any HTTP request passes: bodies, limits, keys, server-sent events, errors."""
