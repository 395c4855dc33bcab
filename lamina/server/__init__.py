"""The OpenAI-compatible server: processes side by side, and the translation between HTTP and the engine."""
