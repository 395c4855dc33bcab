"""Model workers beyond the first: peers, tensor parallelism, pipeline replicas.

`Workers` (`workers/lamina_workers/model_worker/interface.py`) is what the engine needs of its model workers: announce,
execute, copy, join, leave. It has three implementations: `ModelWorker` in this process; `TensorParallelWorkers`
(`workers/lamina_workers/parallel/tensor_parallel.py`), ranks that each have some KV heads; `PipelineReplicas`
(`replicas.py` beside it), whole replicas. The last two drive processes (`workers/lamina_workers/model_main.py`) over
connections of their own (`peers.py`, `peer_messages.py`: msgpack and raw tensors, over a Unix
socket or TCP with TLS).

A holder belongs to a rank: it is a pool of KV of that rank's heads at one place. `Share.heads` count through all ranks;
the messages to a holder count within its rank. So after placement, the code treats a rank as a smaller model with only
its own heads. Ranks run the same batches in the same order. A rank that cannot go on closes its group (the connections
among ranks). The others' all-reduce fails, so none waits for ever; then all form a new group and the batch runs again.

Replicas pass a batch round: each computes from one layer's attention to the next layer's, then sends the batch
(residual stream and attention output) to the next replica. So while one replica waits for attention, another computes.
Passing it at the end of a layer would send half as many bytes, but then the replica that waits for attention is the one
that must go on. In a simulation of two replicas and three lanes that reaches 0.71 of the ideal; the cut at attention
reaches 0.98.
"""
