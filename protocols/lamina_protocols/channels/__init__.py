"""How bytes get to another process: sockets, gRPC, TLS, the handshake.

`AttentionPort` is the interface to one holder: `LocalAttention` (`workers/lamina_workers/ports/port.py`) calls a worker
in this process, `RemoteAttention` (`remote.py` beside it) sends frames over a channel, which `data_channel.py` beside
it has opened. gRPC (`protocols/lamina_protocols/channels/grpc_client.py`) does the handshake (`Hello`: protocol version
and features, model, dtypes, page size, layers; versions that differ by one use what both have (`versions.py`), any
other difference is refused with both values), health, status, and the heartbeat. Everything of a batch goes over one
data channel, in order: a Unix socket where both ends share a host (a private directory, a one-time secret), else a gRPC
stream, or TCP with `data_channel="tcp"`. A frame is a prefix, a msgpack header and raw tensor bytes; the frames of a
layer have a fixed header instead (`layer_frames.py`). A socket sends the tensors' own memory and receives into memory
that the tensors then share; gRPC copies once each way. A channel to another host without TLS carries checksums; a frame
whose checksum differs is a `CorruptFrame`, which ends the session and is counted apart.

Neither side trusts the other. A port counts the replies that are `due`; one more, a malformed one, or a frame that is
not read for its `patience` loses the port, and nothing else. Deadlines hold from when something was asked for, however
many other frames come meanwhile. `close` does not wait: a thread says goodbye. A call without the token gets its
refusal from a handler that waits for no message (`grpc_server.py`), since each call that waits has a thread.
docs/deploy.md says who can do what.

An attention worker (`workers/lamina_workers/attention_server/`) serves one engine at a time, named by an id. The engine
has seats there, each an `AttentionWorker` with a share of the KV memory, and each seat has one or several channels. One
thread computes for all of them (`loop.py`): it waits for any channel and takes one message of each that has something.
A channel ends with its stream, or when its lease runs out (`leases.py`). A seat's KV outlives its last channel by the
`linger` that was asked for, unless the engine said goodbye; model workers say none for an engine that has died. Model
worker 0 begins seat 0: a replica of the model that finds it gone goes away again. An engine that connects with the same
id and seat takes it up, asks by `Survey` what is held in every layer, and continues with a newer epoch; older epochs
are refused from then on. Channels are not ordered against each other: before a sender announces the next batch on
another channel, it waits for a reply on the channel that carried its last `Fresh`.
"""
