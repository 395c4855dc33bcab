"""KV policies: what each KV head's queries read, and what is kept for them. One small file a policy.

Each layer and KV head has a policy (`workers/lamina_workers/policies/`). Policies choose, kernels attend, merge
combines:

- Static policies are arithmetic on positions: `views` says what queries see, `seen_from` and `stays` what may be let
  go. A view has a window and sinks, or `ranges` of keys, which are whole pages. The same `RowBuilder` serves the past
  at a holder and the present at the model worker. The scheduler counts pages by page groups that
  `lamina/launch/kv_sizing.py` makes from the policies (`PageGroup` in `lamina/kv/pages.py`); a new policy changes
  nothing there. A text for all heads means `of_head(head)` for each.
- Adaptive policies have a chooser at the holder. In rows that are decode (`Row.chooses`) it gets each layer's queries
  and answers with a list of pages for each part and head, and perhaps a partial that stands for the rest. Prompts and
  rebuilds read everything. Where a chooser says that choosing does not pay, its heads are read with the others.
- Choosers read sketches (`kernels/lamina_kernels/sketches/sketches.py`): two arenas that are indexed by page number, so
  forks, copies and cuts need nothing more. A sketch is made when a page is full, and is valid as long as the page is.
  `retrieval` reads a page in one of three grades: exactly; its values in 4 bits, weighted by the logits that the scan
  of all keys has given; or the mean of its values. The scan leaves each token's weight in its page in a byte; a second
  launch adds up codes and means in parts of 256 entries, whatever the threads, so sums do not depend on them. Pages in
  the order of a GPU have `sketches/reference.py`.
- Policies that are for comparison with papers have a room of their own, `compared/`. They free nothing: what a paper's
  system would have freed is not read. Outside that room nothing is known of them but that
  `BlockPolicy` sees whole pages.
- Prompts' queries: choosers may learn from a sample of each prompt's queries (`Policy.sampled`). A holder asks for it
  by `Announced.samples`; queries are picked out of what a row asks, or come as a `Sample`, also to parts that neither
  read nor store the row. The sample is kept with the part in 16 bits (`query_samples.py`), and moves, forks and
  rebuilds have it. Graphs are built of it while the last quarter of the prompt comes.
- By request: `SamplingParams.policy` is checked by `RequestPolicies` (`lamina/launch/kv_sizing.py`) and is a field of
  `Request`, of `Share`, `Open` and `Fork` (so parts have it), and of `Span` (so the present is read by it). Prompts of
  all policies that read everything in prefill share one tree of prefixes; what adaptive policies decode enters a tree
  of that policy.
- A batch under policies that do not choose goes on from the one before (`DecodeRows`): one plan for each kind of layers
  moves on, windows within their pieces, pages are freed as it goes, floors and counts follow by arithmetic.
- What was read, what everything would have been, and the estimated mass of the rest are counted for each part
  (`Tallies` in `adaptive.py`), come back with each announcement (`Usage`), and are summed in `Completion.stats`.
"""
