"""The step loop, and what works on its thread.

Two tiers
---------

A new sequence goes to the local tier (the local pool) or to the attention workers, so that the local share of the KV is
as `StepTuner` wants it. `TierController` (`lamina/engine/tiering.py`) measures batches for it and starts the moves.
`KvMigration` (`lamina/engine/kv_migration.py`) copies between batches, for a quarter of a step's time, and switches a
sequence over when it is idle. A sequence in prefill stays where it is. Where both ends lay out pages alike (the
handshake says so), whole pages travel as they are, about 256 KiB a frame over several layers; else keys and values
travel in the order of tokens. A step never waits for a page that is on its way.

A drain of an attention worker is a mark at its holders (`Holder.draining`): no new sequence goes there, running ones
grow elsewhere from then on, and its spares are closed. `Drains` (`lamina/engine/holders.py`) has the mover take away
its sequences in the same way, each to the holders with the most room, or to the local tier (`lamina/kv/relocation.py`,
pure). A sequence in prefill or in a rebuild moves afterwards. Where no move is possible any more, the youngest sequence
gives its KV back and is computed again, one a step, since its end may give the others room. The worker is let go when
nothing is kept there, no operation waits for it, and no batch under way concerns it. A drain ends with an error, and
the worker stays, where no other worker is left, a move fails, or the engine stops. The journal does not have the mark:
after a restart one drains again. A worker that gets SIGTERM says so in its heartbeats, and is drained
(`Engine.leaving`); it ends when it is empty, or after `--drain-timeout`.

Autoscaling. `Autoscaling` (`lamina/launch/attention_pool.py`) has the engine's thread count its load twice a second,
and `Autoscaler` (`lamina/scheduling/autoscaling.py`, pure) says how many workers are wanted.
More: `AttentionWorkers.grow` opens vacant slots of the supervisor. Fewer: the emptiest worker is drained
(`Engine.drain`), then `AttentionWorkers.retire` ends its process, and its slot is vacant. With `lamina serve` and on
Ray both calls are messages to the process that owns the workers, so the number outlives the engine.

What goes wrong, and what follows
---------------------------------

docs/internals/reliability.md has what Lamina promises, and the tests of each group of faults.

- Refused announcement: the plan is undone, the scheduler evicts an unused prefix, else preempts the youngest idle
  sequence, and plans again: only what holders that refused keep. Planning makes room at the holders that are short in
  the same way (`scheduler.py`). The oldest sequence always advances.
- A holder's fault in a batch, or in answer to its announcement: the batch is dropped and runs again from layer 0 with
  the same random counters. A token is recorded, and shown, only when its batch is complete. Any other error of a
  batch, a failed allocation too, is such a fault (`faults` in `workers/lamina_workers/errors.py`). What cannot be
  continued ends the engine: an error in its own books, which is any outside of announcing and computing, and eight
  requests that ended for their failures while no batch went well.
- A request on which batches fail: each row of a failed batch is a suspect (`lamina/scheduling/blame.py`); where a
  holder or a model worker died, each row of all batches under way there. Suspects are computed again where they
  failed, with nothing else under way: as many together as the root of their number, then one that failed again alone.
  The third failure ends the request with an error; every other suspect is cleared as soon as it is past that place.
  So 64 suspects need 16 batches at most. Suspects that are rebuilt or computed again stay among all others up to
  where they failed.
- Keys that did not reach their holder: lost messages are not noted. A part knows up to where KV has come in every
  layer (`Part.stored` in `parts.py`): it advances when a batch has ended with its last layer. A holder refuses a
  row that starts above that, or below what its policy has let go, and says where it can start (`Announced.starts`).
  The scheduler cuts that sequence back to there, at all holders alike, and its next row computes what lacks; where
  too little is left it begins anew. Cached prefixes are given up. The same holds after a fault, a lost message, a
  move, a model worker's return and an engine's restart.
- Answers that the engine's books contradict (`lamina/scheduling/blame.py`): a holder lacks KV that it was sent, or
  refuses for lack of pages though all that it was given leaves enough. The first is computed again; the second is not
  believed, so no sequence is preempted for it. The third such answer without progress between them is the holder's
  fault, and it is given up like one that does not answer; a request on which that goes on is a suspect as after any
  loss. Pages taken are counted from what sequences and prefixes have (`RunningSequences.most`), known tokens and
  failed batches included: more than honest holders take. No holder has fewer pages left than that leaves, whatever it
  says, nor more than all.
- A holder is lost: see above. Cached prefixes that were there are given up, unless spares have what is lost. A
  request for which there was room before waits, as if the holder came back. A holder joins: new sequences use it,
  running ones grow there, and what pays is moved there. A holder is drained: running sequences grow elsewhere at
  once, and its parts move to the others while all go on; what has no room there is computed again.
- A holder is lost again and again: its place is held back (`lamina/deploy/breakers.py`), unless it is the only one.
  After frames with changed bits twice a day it is quarantined, even then (reliability (docs/internals/reliability.md)).
  `Backoff` (`supervision.py`) is something else: how long the supervisor waits before it starts a process again.
- A copy fails: moves are given up, and sequences are where they were; a spare is copied again later.
- Logits that are not finite: that request ends with an error and its KV does not get into the prefix cache; the rest
  of the batch continues.
- A client that cannot take its outputs: its request ends, no other does.
- A model worker beyond 0 dies: the batches under way are dropped. A rank is waited for (`recovery_timeout`) and takes
  up its seats; replicas go on without the lost one.
- The engine dies: see the journal. All requests that the next engine takes up are suspects. The journal has a record
  before each batch of suspects, so a request of which three engines died, in the last one alone, is not taken up
  again; its client gets an error.
"""
