"""Routes, fields and answers as OpenAI and vLLM name them."""
