"""The `lamina` command: words in, text or JSON out; one file a command group."""
