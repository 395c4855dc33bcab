"""A decode step's exchange between both sides of the cut without Python.

Between two processes that share two cores, a layer's exchange costs what its code costs that the weights have just
driven out of the caches. So in decode no Python runs in it. The frames of a layer (`Query`, `Fresh`, `Exchange`,
`Attended`) have a header of 64 bytes, of which all but the last eight (layer, seconds) are the same in all layers of a
batch, and tensors at multiples of 64. `protocols/lamina_protocols/frames/layer_frames.py` is the only place of that
layout: both sides make a header a batch from it, and compiled code compares the headers that come with it and copies
tensors by offsets that it was given.

- The model's half (`model_worker/compiled_exchange.py`, `kernels/lamina_kernels/exchange/exchange_loop.py`): one call
  sends q, k and v to every holder elsewhere, stores and attends what is kept in this process, waits for all answers,
  and merges them. With one process it is a store, an attention, and nothing else.
- The holder's half (`attention_server/layer_server.py`, `serve_loop.py`): a poll that answers layers meanwhile.
  It returns to Python at the end of a batch, and for every frame that it was not told of: announcements, moves,
  surveys, old epochs, other batches, wrong sizes. Such a frame is left on the socket whole, and Python reads it with
  the errors that it always has.
- Each pool of a batch has an exchange and a served batch of its own; they know layers by their numbers in the whole,
  of which a pool has some.
- A socket is lent to compiled code for the time of a call (`SocketChannel.lend`), under the lock that `close` takes.
  What a call leaves half read or half sent goes back to the channel, so between two calls nothing is half done.
  Signals, deadlines and the end of the stream end a call.
- Over TLS, gRPC and checksummed TCP Python carries the same frames without looking into them; compiled code does the
  rest.
- gRPC's own threads read no sockets: `protocols/lamina_protocols/channels/grpc_core.py` imports gRPC with its event
  engine off, for the versions that know that choice and unless `GRPC_EXPERIMENTS` says something. It has no effect
  where something else imported gRPC first.
- Python does it all where compiled code cannot: other kernels than the CPU's, tensors on a device, dtypes that differ
  from the pages', heads whose policy chooses, means, samples of prompts' queries, prompts beside decode.
  `LAMINA_EXCHANGE=python` switches compiled exchanges off, to compare.
"""
