"""Layers that keep a state instead of KV: linear attention, the delta rule and state spaces.

A layer of linear attention, of the delta rule or of a state space keeps, of each sequence and head, one record: a state
and the last inputs of its convolution (`kernels/lamina_kernels/states/layout.py`). `states/advance.py` takes tokens
into it: `plan` checks a batch and deals it to threads once for all layers, `with_pages` gives the next batch's plan of
the same rows, `advance` does one layer. Recurrences in plain torch are in `tests/support/state_reference.py`.

- A record is read from one page and written to another, or to the same. A source that is no target stays as it is, so
  a batch can run again.
- A row of one token reads each state from memory once and writes it once. While one head's state is written, the next
  one's is fetched; a state that goes to another page is written past the caches.
- A row with drafts keeps the inputs of its tokens in a page of their own, and writes the state before them. The next
  row first takes in those that were accepted. So a state is read and written once a step, where records of k drafts
  would be k writes: of 128 x 128 floats a token's inputs are 1/45. Token by token, numbers are those of rows of one.
- Longer rows go in blocks of 64 tokens, by matrices (`states/blocks.py`). Decays are products, never quotients or
  differences of sums: nothing overflows, and a decay of e^-1e30 beside one of 0.9 costs no digit.
- Everything is float32. What a row gives does not depend on the rows beside it nor on the threads.
"""
