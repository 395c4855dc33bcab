"""Requests over time: real traces, excerpts, drawn ones."""
