"""The forms of replies by family of models: a grammar that calls of tools fit, and a parser that finds them."""
