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

`lamina/kv/relocation.py` says when a sequence goes on growing at another holder, and which KV moves afterwards. Its old
part ends at a page border by the operation `Bound`, and a new one is opened above it. So a sequence has several ranges
of the same heads, at most eight, each a row in its batches. The journal has a sequence's parts as they are after each
batch; where the engine died before that was written, the next one believes the holder, and what lies above the border
is new. A worker of version 7 does not know `Bound`: its parts keep their ranges.

A holder that joins costs the step loop only bookkeeping: connection, handshake, pools, kernels and `Workers.prepare`
come before `Engine.join` is posted.

Redundancy
----------

With `redundancy` the KV of a sequence has spares at other attention workers. `groups` (`lamina/kv/redundancy.py`) says
which shares go together, `Spares` (`spares.py`) what each owner lacks and what follows from a loss, `SpareKeeper`
(`lamina/engine/kv_spares.py`) when and how fast they are copied: for 4 % of the time at most, a running sequence each
64 tokens, a prefix at once. A sixteenth of each pool stays free of them. What a spare lacks after a loss, the last
tokens, is computed again by `KvRebuild`; prefixes whose lost shares have no spares are given up. An engine that is
started again closes the old spares, which it does not know, and makes others. What cannot have spares is refused
(`lamina/launch/checks.py`, `lamina/config.py`): too few workers, states, policies and windows that let go, parity over
unlike page layouts. A request's own policy that lets go has no spares.

Moves, drains and spares copy by one primitive, `KvCopies` (`lamina/engine/kv_migration.py`): a generator that is
suspended while it waits for a holder, so no step waits for a copy.
"""
