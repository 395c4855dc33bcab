"""What crosses between workers: messages, their codec and their errors, and the channels that carry them."""
