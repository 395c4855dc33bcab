"""Attention over pages on CPUs: lists of pages, compiled loops, shares of work, merges.

Indexes that a model was trained with
-------------------------------------

MiniMax-M3, DeepSeek V3.2 and GLM-5 were trained to read few keys: an index chooses them, prompts' too. `Index` in
`protocols/lamina_protocols/messages/layers.py` is the whole rule: index keys, index queries, blocks of keys, how many
of them. MiniMax-M3 takes 16 blocks of 128 keys for each KV head, DeepSeek 2,048 single keys for all heads.

- Where it is: an index key stands behind each key, `[k | index key]`, so it is stored, copied on write, forked,
  fetched and moved with it (`PageLayout.d_index`; attention reads the front of K). Index queries, and their weights,
  are cut into pieces, one behind each query of the KV head's group (`LayerSpec.query_width`): no message is new.
  `workers/lamina_workers/decoder/choices.py` computes both.
- Which pool: layers with an index and layers without one are different pools, as MiniMax-M3's first layers and the
  others.
- Who chooses: the best keys are best among all, past and present. So every row of such a pool is fused: the part
  stores the row's tokens and attends up to its end (`Placement`, `indexed`), in prompts and rebuilds too. A part that
  kept its KV in a loss reads what it has. A local copy has all keys or is not made. Each KV head chooses alone, so
  workers divide heads; `shard="sequence"` would need a merge of scores, and is refused.
- How: `IndexAttention` (`workers/lamina_workers/attention_worker/index_attention.py`) attends tokens that see no more
  than they may read as everywhere. For the others `kernels/lamina_kernels/attention/index_choice.py` scores all index
  keys, in one compiled loop over the pages (`loops.py` there), and the kernels attend lists of pages, or of slots
  where a block is no multiple of a page.
- A policy on such a layer is refused, and so is attention on a GPU. `Completion.stats["kv_read"]` has what was read,
  index keys included.
- Price: the index key stands at each KV head, though it is the same: MiniMax-M3's KV is 1.5 times as large (1.1 would
  do), but a worker reads it once for all its heads. In int8 it shares its key's scale.
- Layers that take over another layer's choice (`indexer_types` "shared" of GLM-5) are refused.

A decode step of one layer, bfloat16, one thread, `scripts/bench/indexes.py`, beside other work on the same cores:

- MiniMax-M3, 4 sequences of 4,096: index: 2.2 ms; all keys: 4.5 ms
- 4 of 16,384: index: 7.0 ms; all keys: 16 ms
- 4 of 65,536: index: 10 ms; all keys: 61 ms
- DeepSeek V3.2, 2 sequences of 8,192: index: 15 ms; all keys: 22 ms
- 2 of 32,768: index: 20 ms; all keys: 81 ms
"""
