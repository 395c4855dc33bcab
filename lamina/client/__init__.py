"""The caller's side of an engine: prompts in, outputs to text, in this process or over a connection."""
