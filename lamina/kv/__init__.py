"""Where each sequence's KV lies, and what follows when holders come and go. Pure: no tensors, clock or files."""
