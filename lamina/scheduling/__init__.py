"""Pure decisions: who computes what in the next batch, and which holder keeps what."""
