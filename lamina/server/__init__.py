"""The OpenAI-compatible server: processes side by side, and the translation between HTTP and the engine.

                    lamina serve: the supervisor (no torch, no HTTP; it owns the listening socket)
       ┌─────────────────────────┼──────────────────────────┐
  http_main                 engine_main               attention workers
  FastAPI, templates,       Runtime + EngineListener  as without a server
  tokens to text, metrics         │                         │
       └── Unix socket: commands ─┤                         │
           and batches of events  └──── data channels ──────┘

The processes (`lamina/server/processes/`) stand side by side, so the death of one leaves the others. The step loop
shares its interpreter with as little as possible: JSON, chat templates, detokenising and metrics are in the HTTP
process, which loads neither torch nor Ray. `engine_link.py` is a `Wire` between `RemoteEngine` and `EngineHost`, the
same two that stand on either side of Ray; where the engine is on a cluster, one pair stands behind the other.
`child_protocol.py` is how the supervisor and its children speak: JSON lines on pipes, which also tell a child that its
parent has died.

With several models each has an engine process, a `Frontend` and an `EngineLink`. `Models` gives a request its model
(`Service.read` waits for it), `decide` in `models.py` says which model is loaded and which is unloaded, and the HTTP
process, which alone knows who waits, asks the supervisor for both. A model that requests use is never unloaded: a
request gives it back when its response has ended. A spare engine process that has imported everything, without a model,
waits for the next load.

There is one request model inside, and dialects at the edge. A `ChatInput` (`chat/chat_input.py`) is a chat in OpenAI's
chat form with unchecked values; `prepared` checks it, renders it and makes its request and its `ReplyPlan` (by the
`ReplyFormat` of the model: its family's form of calls and reasoning, a grammar to write it and a parser to read it); a
`Reply` gives deltas and the parts (reasoning, content, calls) that they add up to, in the order in which they were
written. A dialect only translates: JSON to the one, parts to JSON. Streams of items (`openai/responses/events.py`) and
of blocks (`anthropic/blocks.py`) begin and end where a part does. What `/v1/responses` keeps is in `ResponseStore`, in
the HTTP process, for each key within bounds; a response holds its own input and output, and a conversation is found by
walking back.

What a client may cost is bounded before memory or time is spent on it: `http/protocol.py` bounds connections, heads,
and the seconds that a client may take; `http/limits.py` the bytes of all bodies together and the values in one;
`openai/schemas.py` each list. `EngineHost` reports to its client when the engine is halted, that is, when no attention
worker is left or a model worker is missing; `/health` is 503 then.

Each API key is a tenant (`Request.tenant`). `shares.py` deals the places in the HTTP process's queues to keys; the
scheduler deals batches and KV. While several tenants have work, or had lately, a batch is kept short: so short that the
tenant that asks for least waits little longer than alone, and that a newcomer waits little for the batch under way,
which cannot be stopped. How long batches take is measured. A tenant that waits for pages gets them from one that has
more. The price is throughput: on a CPU, small batches read all weights for few tokens.

`Frontend.begin` submits requests and gives a `Generation`, an iterator over events. Leaving the generation, for any
reason, ends what has not ended; so a client that goes frees its KV with the engine's next batch. `lamina/server`
translates and decides nothing: limits, sampling and scheduling are the engine's.

- an attention worker: a pause, as without a server
- the engine: streams pause while the supervisor starts another engine, which takes up the KV at the same attention
  workers by its journal (without a journal all is computed again); new requests get 503 meanwhile; an engine that
  does not come up ends the server with status 1
- the HTTP process: its connections break, the engine ends its requests, the next HTTP process takes the same socket
- the supervisor: everything ends

SIGTERM: nothing new is taken, requests under way get `--drain-timeout`, a second signal does not wait; status 0.

`lamina/text/structured_output.py` holds a sample to a grammar: compiled and checked before the engine sees it, its
state belongs to the sample and advances when a batch is recorded, so a batch that fails and runs again changes nothing.
Masks are computed on threads of their own (`lamina/engine/masks.py`): a batch waits a few milliseconds for them, and a
sample whose mask is not there then is left out of batches until it is. `Engine.snapshot` answers between two batches
with what the engine is doing; metrics and the page are made of that.
"""
