"""Where each sequence's KV lies, and what follows when holders come and go. Pure: no tensors, clock or files.

Sequences at holders
--------------------

A holder keeps KV: a seat at an attention worker, or a pool in the engine's process. A sequence gets a layout when it is
opened: for each holder a share, which is some KV heads at a range of positions (`lamina/kv/kv_shares.py`). Heads and
ranges are given out in proportion to memory; the first holder changes from one sequence to the next, so three heads on
two workers are even over many sequences. What a holder has of a sequence is a part with a handle of its own, so after a
loss a holder can have several parts of one sequence. `Placement` turns a plan into rows for parts.

The rows of a part:

- without attention workers, or on the local tier: read by the local holder, fused; stored by the same
- decode, by heads: read by each part, its heads, all of the past; stored by the same
- decode, by ranges: read by each part its range; stored by the part whose range the token falls into
- prompt: read by its local copy, fused; below where the copy begins, the parts; stored by the parts and the
  local copy, which is closed at the prompt's end
- prompt without a copy: read by the parts; stored by the same
- rebuild after a loss: read as a prompt is, from the first lost position on; stored by the new parts alone

A model worker's process has one local pool. Whole sequences of the local tier are there, and local copies of prompts
(and rebuilds) that are computed for attention workers. A copy is made where the ledger has pages for the whole prompt
that no sequence was promised (`lamina/kv/local_copies.py`); cached prefixes that are not in use give way to it. It is
never a reason that a sequence waits: admission counts its pages as free, and where a sequence needs them, copies are
closed before anything is preempted, at once or when the batch that reads them is over. The prompt is then read at its
parts. A copy can begin at any position, so the rest of a prompt gets another one when there is room.

Growth
------

A sequence's growth is the positions that it will still get. They need not come to the holder where the sequence began:
from the next page border above all that is planned, another holder of the same heads can take over, and no byte moves.
`Growth` (`lamina/kv/relocation.py`, pure) decides that in three cases:

- a holder joins: it gets the growth of those sequences for which a part more pays (64 tokens or more), until all
  holders have about the same share of their pages left;
- a holder is drained: nothing grows there any more;
- a holder is full: before a sequence is preempted for lack of pages, it goes on at a holder with room.

The old part ends at the border by the operation `Bound`, and a new one is opened above it. So a sequence has several
ranges of the same heads, at most eight, each a row in its batches. Both operations wait in outboxes like any other. The
journal has a sequence's parts as they are after each batch; where the engine died before that was written, the next one
believes the holder, and what lies above the border is new. A worker of version 7 does not know `Bound`: its parts keep
their ranges. Not divided are states, keys among which an index or a policy chooses, what evicts, layers with windows
alone, the local tier, and sequences that are being rebuilt.

Balance. After a join, KV that is there already moves in the background, one move at a time and in every fourth gap
between batches (`lamina/engine/tiering.py`), as long as `next_move` (`lamina/kv/relocation.py`, pure) finds one that
pays: from the holder that reads most to one that reads a quarter less, of sequences that will still get 128 tokens.
Each move brings the two closer and never past each other, so moves come to an end and none is taken back.

A holder that joins costs the step loop only bookkeeping: connection, handshake, pools, kernels and `Workers.prepare`
come before `Engine.join` is posted.

Redundancy
----------

With `redundancy` the KV of a sequence has spares at other attention workers: parts of its own that no row reads. A
replica has the pages of one share, parity the XOR of the pages of several shares of the same positions, which lie at as
many holders. `groups` (`lamina/kv/redundancy.py`) says which shares go together, `Spares` (`spares.py`) what each owner
(a sequence or a cached prefix) lacks. Forks of an owner fork its spares, so pages that many share are kept once in
spares, too.

- Copying. `SpareKeeper` (`lamina/engine/kv_spares.py`) copies whole pages between batches, for 4 % of the time at
  most, and without a bound where nothing else is to do. A running sequence is copied each 64 tokens, a prefix at
  once.
- Room. Pages of spares count as unused, and go first where others need pages, before prefixes: a spare is never a
  reason to wait or to preempt. A sixteenth of each pool stays free of them.
- A loss. A replica becomes the part; no byte moves. Of a parity group the lost share gets another holder, which is
  sent the XOR of the parity and the others (`spares.py`); its sequence waits for that, not its neighbours. What
  the spare lacks, the last tokens, is computed again by `KvRebuild`. Prefixes whose lost shares have spares stay, the
  others are given up.
- After it spares are made anew in the background. An engine that is started again closes the old spares, which it
  does not know, and makes others.
- Refused where it cannot be (`lamina/launch/checks.py`, `lamina/config.py`): too few workers, states, policies and
  windows that let go, parity over unlike page layouts. A request's own policy that lets go has no spares.

Moves, drains and spares copy by one primitive, `KvCopies` (`lamina/engine/kv_migration.py`): a generator that is
suspended while it waits for a holder, so no step waits for a copy.
"""
