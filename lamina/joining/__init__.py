"""Machines of the same network that give a server their memory: found, compared by a code, accepted, and back by
themselves after a restart.

`lamina/joining` has both sides of `lamina join`. `pairing.py` makes the code, `book.py` says which machine is in which
state and how many may ask; both are pure. `stream.py` is the connection (TLS 1.3, JSON lines, bounded), `discovery.py`
multicast DNS, `records.py` what is remembered. `server.py` is in the supervisor's process, a thread a connection;
`attention_role.py` gives its workers to the `AttentionRole` beside those that are started here, and the HTTP process
what the operator sees (`lamina/server/machines.py`). `machine.py` is the other side, one loop: it keeps the connection,
which is the machine's lease, and an attention worker (`worker.py`).

A machine's first message commits to a random number, the server answers with its own, the machine reveals. The code is
six digits of a hash of both numbers, the offer and the server's certificate as each side sees it. A machine in between
has two certificates, so two codes, and has committed to its numbers before it knows them; it meets the other code by
chance, once in a million, and a server makes five codes in five minutes. Later the machine knows the server by its
certificate's fingerprint and shows a key of 32 random bytes, of which the server has the hash. The worker's own key
never leaves the machine; its CA and token go over the connection at each start. Its address is the one that the machine
comes from, so a machine can name no other.

An engine that may get machines starts with `RelayedWorkers(optional=True)`: with its local tier alone. What one
sequence can have grows when a machine joins (`FailureReports.room`), stays while one is lost, and shrinks when one has
been drained.
"""
