"""What every HTTP request passes: limits, API keys, server-sent events, errors."""
