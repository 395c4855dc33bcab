"""Lamina's attention workers behind other engines, which keep the model, the scheduler and the numbers of blocks.

    lamina attention-worker --listen 127.0.0.1:7311 --kv-memory 8GiB       # on each machine with memory
    pip install -e .                                                       # in vLLM's environment, beside vLLM
    LAMINA_ATTENTION_WORKERS=127.0.0.1:7311 vllm serve MODEL

docs/behind.md says what happens in vLLM then, when a worker dies, which variables there are, and what is refused.
`vllm_plugin.py` is what vLLM loads; without `LAMINA_ATTENTION_WORKERS` it does nothing, and imports nothing.

transformers does the same for `generate`, with two arguments (`transformers_cache.py`):

    from lamina.behind.transformers_cache import LaminaCache, register

    register()
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="lamina")
    model.generate(**prompts, cache=LaminaCache(model.config, workers=["127.0.0.1:7311"]))

`block_tier.py` has the client (`BlockTier`): a step is announced by its block tables (`BlockTables` in
`lamina_protocols.messages.messages`), then each layer's q, k and v go to the workers, and the attention output comes
back. `scripts/reference_client.py` does the same without Lamina's code, and says what crosses.
"""

SWITCH = "LAMINA_ATTENTION_WORKERS"
"""The environment variable that has the attention workers of an engine beside Lamina's own: "host:port,..." or
"local:N"."""
