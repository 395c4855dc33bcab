"""What the compiled halves of a layer's exchange are called with: blocks of numbers and addresses, and their results.

One layer's exchange over time, and the field that marks each arrow (`a` EXCHANGE, `r` a REMOTE, `s` the SERVED of
the holder, `c` a CHANNEL):

    model's process                                           holder's process
    begun 0         r.layer, r.live = 1, r.arrived = 0        s.live, s.layer: due, s.arrived = 0
      | ask: a.asked
      |---- q, k, v ---- r.sent up to r.sent_size ----------> c.current, c.have; s.claimed while a frame arrives
    begun ASKED                                               s.arrived: the frame is whole
      | attend here: a.local                                    | store and attend: s.nanoseconds
    begun ATTENDED, from a.waits_since                          |
      |<--- answer ---- s.sent up to s.reply_size; s.claimed, and s.by its channel, while some of it has not left
      | r.arrived: the answer is whole                        s.layer: the next one of s.following; s.live = 0 after
      | merge: into a.whole                                   the last one
    begun 0, the next a.layer

A wait that Python must look at ends with a result below, and a.at says which remote it is about.

A frame is told by its first 64 bytes. All but the last eight must be those of the block that expects it, then comes the
layer's number, which must be the one that is due. The layout is the codec's: callers fill blocks in from it.
"""

from __future__ import annotations

import numpy as np

from lamina_kernels.compile.launch import block_type

ASKED, ATTENDED = 1, 2  # how far an exchange is
HEAD, SAME = 64, 56  # bytes of a header, and of those how many are the same in each layer
AGAIN, OTHER, ENDED, TIMEOUT, INTERRUPTED, WAITING, CARRY = -1, -2, -3, -4, -5, -6, -7
"""Nothing is there now; a frame that no block expects, or a broken socket; its end; no answer in time; a signal came;
an answer is not there yet, and the caller does not wait; frames are to be sent, or to be received, by Python. OTHER and
ENDED are for Python to look at."""


EXPECTED = [
    ("live", "i8"),
    ("layer", "i8"),  # that is due
    ("layers", "i8"),
    ("head", "i8"),  # address of the header that its frames have
    ("frame", "i8"),  # where a frame goes, and its bytes
    ("size", "i8"),
    ("arrived", "i8"),  # when, in nanoseconds; 0: not yet
    ("claimed", "i8"),  # a channel is receiving its frame, or its answer has not left: no other frame of it may begin
    ("timed", "i8"),  # its frames say how long they took
]
CHANNEL = np.dtype(
    [
        ("functions", "i8"),
        ("descriptor", "i8"),
        ("scratch", "i8"),  # address of 128 bytes: a header, a time, a number
        ("current", "i8"),  # address of the EXPECTED whose frame is arriving, 0: none; and how much of it has come
        ("have", "i8"),
        ("expected", "i8"),  # address of the addresses of those that may come
        ("n_expected", "i8"),
        ("received", "i8"),  # bytes so far
        ("sent", "i8"),
    ]
)
SERVED = np.dtype(
    [
        *EXPECTED,
        ("following", "i8"),  # address of int64 [layers]: the layer that is due after each; after the last: `layers`
        ("work", "i8"),
        ("q", "i8"),  # addresses in the frame
        ("k", "i8"),
        ("v", "i8"),
        ("stores", "i8"),
        ("attends", "i8"),
        ("reply", "i8"),  # the answer's frame, its bytes, and how many of them have left
        ("reply_size", "i8"),
        ("sent", "i8"),
        ("by", "i8"),  # address of the channel over which the last answer was sent, or of scratch
        ("out", "i8"),  # addresses in the answer
        ("lse", "i8"),
        ("nanoseconds", "i8"),  # spent so far
    ]
)
SERVER = np.dtype(
    [("polls", "i8"), ("n", "i8"), ("channels", "i8"), ("functions", "i8"), ("timeout_ms", "i8"), ("result", "i8")]
)
GATHERED = [(f"{x}_{what}", "i8") for x in "qkv" for what in ("index", "count", "bytes", "to")]
REMOTE = np.dtype(
    [
        *EXPECTED,
        ("channel", "i8"),  # 0: its frames are carried by Python
        ("sent_frame", "i8"),
        ("sent_size", "i8"),
        ("sent", "i8"),
        *GATHERED,
        ("timeout", "i8"),  # nanoseconds
        ("taken", "i8"),  # address of int64 [layers]: nanoseconds from asking to the answer
    ]
)
HERE = np.dtype([("work", "i8"), *GATHERED, ("out", "i8"), ("lse", "i8"), ("taken", "i8")])  # taken as of REMOTE
EXCHANGE = np.dtype(
    [
        ("functions", "i8"),
        ("scratch", "i8"),
        ("layer", "i8"),
        ("begun", "i8"),  # ASKED, then ATTENDED
        ("waits", "i8"),
        ("carried", "i8"),  # how many of the remotes have no channel
        ("q", "i8"),  # addresses of the layer's q, k and v
        ("k", "i8"),
        ("v", "i8"),
        ("n_remotes", "i8"),
        ("remotes", "i8"),
        ("n_here", "i8"),
        ("here", "i8"),
        ("polls", "i8"),
        ("n_merges", "i8"),
        ("merges", "i8"),
        ("merge_kernel", "i8"),
        ("whole", "i8"),  # vectors that answers are merged into
        ("whole_lse", "i8"),
        ("whole_out", "i8"),
        ("whole_bytes", "i8"),
        ("asked", "i8"),  # times in nanoseconds
        ("waits_since", "i8"),
        ("at", "i8"),  # which remote a result is about
        ("result", "i8"),
        ("local", "i8"),  # sums in nanoseconds
        ("remote", "i8"),
        ("answered", "i8"),
        ("waited", "i8"),
    ]
)
Expected, Channel, Served, Server, Remote, Here, Exchange = map(
    block_type, (np.dtype(EXPECTED), CHANNEL, SERVED, SERVER, REMOTE, HERE, EXCHANGE)
)
_EXPECTED = np.dtype(EXPECTED)
