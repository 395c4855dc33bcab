"""From a config to a running engine: sizes, pools of workers, wiring.

`start` (`lamina/launch/builder.py`) runs four steps on the engine's own thread, each of which gives a frozen record. A
failure undoes what was started.

1. `load` (`model_files.py`): a name becomes a folder (`lamina/models/resolve.py`), a tokenizer and a model config.
2. `size_kv` (`kv_sizing.py`): devices, threads, the KV memory and policies of each holder, the scheduler's limits.
3. `connect` (`builder.py`): the pools of other workers (`attention_pool.py`, `model_pool.py`) and the journal
   (`journal_setup.py`).
4. `assemble` (`builder.py`): weights, decoder, ports, control plane and engine; holders join, and a journal's
   requests are taken up.

`LLM` does this in the caller's process, `lamina serve` in a process of its own
(`lamina/server/processes/engine_main.py`), a Ray cluster in an actor (`lamina/ray_cluster/actor.py`).
"""
