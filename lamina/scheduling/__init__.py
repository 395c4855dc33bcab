"""Pure decisions: what is computed in the next batch, and which holder keeps what."""
