"""Routes, fields and responses as OpenAI and vLLM name them."""
