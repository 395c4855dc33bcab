"""Models that Lamina has no class for and transformers has: cut at attention by their own code.

`model_config` (`workers/lamina_workers/converted/models.py`) takes a native family where there is one, else the
converter. docs/models.md has the models of each kind. transformers' own code says what a model computes; it is imported
then, in `modeling.py` alone, and code from a model's folder never runs.

1. `config.py` runs the model once on the meta device, with an attention function of ours (`attention_calls.py`). So
   each layer's spec is known, and what Lamina cannot attend is refused by name: masks are probed as functions of
   positions.
2. `recording.py` records all operations of a forward pass on the meta device, for 5, 1009 and 1 tokens: integers that
   differ are linear functions of the number of tokens. Experts are one operation. Where runs differ otherwise,
   transformers' module itself runs, in a greenlet that stops at each attention (`coroutine.py`).
3. `fusion.py` replaces operations by Lamina's: maps of one input side by side, norms, gating, heads with RoPE; each
   is tried beside the model's own first.
4. `cuts.py` cuts at each attention where the fewest bytes a token live on. What depends on no attention is made again
   from ids and positions. `slices.py` runs the slices, `decoder.py` runs slices that are just a span of a native
   decoder.
5. `weights.py` gives transformers views of the file, which change names where they must, and moves each weight once
   to its place.
6. `models.py` runs three tokens in two orders, in slices and as the module, before the model serves.
"""
