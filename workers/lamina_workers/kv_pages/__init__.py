"""Pages of KV in memory and in files: the store, and its parts.

States
------

A layer of linear attention, of the delta rule or of a state space keeps no KV. It has one state for each head, whatever
the length of the sequence. Its holder is sent one message a layer, `Advance`: the layer's inputs before the
convolution, and the gates. It updates the states, reads them, and answers with `Advanced`. So a prompt and a decoded
token take one path, and nothing merges: heads are on one holder or another, and a state is never cut by positions.

A page of a state pool is one record: the state of one layer and head in float32, then the last inputs of the
convolution. A part has the records at two positions (`workers/lamina_workers/kv_pages/state_store.py`): `held`, behind
its last row, and `before`, at that row's start. A row reads the one and writes the other, so the batch can run again
until it has ended in every layer; then the two take turns. A row may start at `held`, `before` or 0. A fork shares the
records at one of these positions, and what several parts share is never written. So a cached prefix can be used at its
end alone, and a snapshot is nothing but a fork.

`state_pool.py` beside it keeps the arena, the layers' constants (convolution, skip), which the model worker sends when
a holder joins, and the kernels' plan of a batch. In decode two plans take turns, as the records do. `state_traffic.py`
in `workers/lamina_workers/model_worker/` deals inputs by heads and puts outputs together. States move between holders
as KV does, as whole pages, but of one position (`ModelWorker.copy`). A sequence that moves (to another tier, or away
from a drained worker) has its KV copied while it goes on, and its states last, once it is idle, at both positions: so
it takes as many records as before. A lost state is nowhere else, so its sequences begin anew, from the cached prefixes
that are left.
"""
