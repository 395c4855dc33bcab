"""One shard of the KV cache: append, attend, free.

With `kv_cold` pages leave memory for a file. `ColdPages` (`attention_worker/cold_pages.py`) knows in which batch each
page was read or written last; `ColdFile` (`cold_file.py`) moves bytes. Pages unread for 128 batches leave; beyond
`kv_resident` the longest unread leave sooner, but none of the last 16 batches. What is to leave is written beside the
batches; then its chunk of 2 MiB becomes a private mapping of an unlinked file at the same address, so a page keeps its
number, and kernels know nothing of it. Sketches stay. A chosen page is asked for ahead (WILLNEED). A full disk is a
warning; a read error of the disk ends the worker, and its KV is computed again as after any loss.
"""
