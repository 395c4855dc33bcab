"""Worker processes started, watched and started again: on this host, elsewhere, on Ray.

A `Slot` (`supervision.py`) is room for one worker, and `SlotLoop` there the loop of a thread over some slots. `Backoff`
says how long a slot waits after its worker has ended. An engine gets its workers as an `AttentionWorkers` or a
`ModelSupervisor`, however they are run: as child processes (`local.py`), at addresses that were given
(`listed_attention.py`), or as Ray actors (`lamina/ray_cluster/attention.py`, `models.py` there).

Attention workers may outlive the engine: those of a server belong to its supervisor, those on a cluster to the process
that asked for the engine. Such an owner has an `AttentionRelay`, and the engine `RelayedWorkers`
(`relayed_attention.py`).

`breakers.py` is something else than `Backoff`: whether the engine uses a worker that is there again, after losses or
changed bits at the same place. `AttentionPool` (`lamina/launch/attention_pool.py`) asks it.
"""
