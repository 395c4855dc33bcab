"""What crosses between workers: the messages of a batch, their codec, their errors. Knows no model, no engine."""
