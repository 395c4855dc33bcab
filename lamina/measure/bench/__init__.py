"""Benchmarks: `client` and its neighbours load a server over HTTP, `decode` times an engine in this process."""
