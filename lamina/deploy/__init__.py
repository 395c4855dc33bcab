"""Worker processes started, watched and started again: on this host, elsewhere, on Ray."""
