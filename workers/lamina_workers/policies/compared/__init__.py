"""Policies that exist for comparison with papers' systems. Nothing of speed or memory depends on them.

All keep every page; a paper's savings of memory are seen in what they read. They are of two kinds, each of which asks
a policy for one thing:

- `HeadChooser.pick` (`base.py`): which pages a head reads in this step of decode, and what stands for the rest.
- `BlockPolicy.seen_blocks` (`blocks.py`): which blocks of keys the queries of a block see, in prompts too.

`span` is a window, and needs neither; only its pages are freed.
"""
