"""One request model for chats, whatever dialect they come in: prompts, tools, reasoning, and the parts of an answer."""
