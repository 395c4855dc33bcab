"""What outlives an engine: requests and their tokens on disk, and how they are taken up again.

`Recorder` (`lamina/journal/recorder.py`) writes to the `Journal` what is decided: requests, the tokens of each complete
batch, ends, and parts as placement opens, forks, moves and closes them. `history.py` (pure) makes open requests of
these records. A new engine surveys its seats: a sequence continues from what all of its parts have in every layer,
parts that are gone are rebuilt as after a loss, unknown parts are closed. Clients send what they have received, and get
the rest from the journal, or it is computed again with the same random numbers (`resumption.py`).
"""
