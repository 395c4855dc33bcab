"""The dense side of the cut: announce a batch, execute it, merge partial attention.

Decode is fused where its keys are stored
-----------------------------------------

The holder that stores a decoded token attends it with its past (`Row.fused`): by heads each part, by ranges the last
one. So the model worker has no attention of its own and mostly nothing to merge, and fewer threads want the cores.
Prompts keep the older order: holders attend the past, the model worker the prompt's own tokens, and both merge. What
follows from that:

- Rebuilds: a position that is computed again is not fused. Of the parts that hold it, only the lost ones store it, so
  no part could attend it for all.
- Floors: storing cuts a part back to the row's start, as before, so a batch that runs again stores and attends the
  same token again. A survivor's floor depends on what its policy has let go below the start, not on who attends the
  token itself.
- Lanes and the local share: a holder in this process counts as local, whether it fuses or not; all others count as
  remote.
- Moves: KV is copied between batches, and the target's part stores and attends from the next batch on.
- q first needs the older order, since a fused holder cannot begin before k and v are there.

Two orders of q, k and v
------------------------

Fused: q, k and v of a layer leave together (`Exchange`). q first: q leaves before k and v are computed (`Query`), the
holder attends the past meanwhile, k and v follow (`Fresh`), and the model worker attends the row's own token and
merges. That hides the projection of k and v and their way; it costs a message, an attention and a merge, and Python
carries it. The order belongs to a batch: `Placement.place` gets what its decode rows are (`fuses`), and model workers
see it in their routes (`query_goes_first` in `holder_traffic.py`): q goes first where a holder elsewhere attends
earlier tokens alone, and not every row is attended to its end by holders. So prompts and rebuilds that are read
elsewhere send q first in either order. `Decoder.forward(query_first=True)` then yields q before it computes k and v.

- Graphs: one for q and one for k and v, beside the one with all three. Weights that oneDNN has repacked
  (`dense.repacks`) are cut into two repacked halves when q first goes first, and the whole is then a call of each.
- Replicas: a `Fresh` has no answer, and the next announcement comes over another channel. A replica's next query is
  answered after it, on the same channel; so in the last layer that a replica attends of a batch q, k and v go
  together.
- `StepTuner` tries q first where the order is not given. `query_first="always"` or `"never"` fixes it.
- The simulator takes the cheaper of both (`Offloaded.step`): a link's `query_first_time`, which `lamina
  calibrate-hardware` measures, against what is hidden.
"""
