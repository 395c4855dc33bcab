"""A worker of the same kind has attended before an engine waits for the first one."""

from __future__ import annotations

import logging

import pytest
import torch

from lamina_protocols.messages.layers import HolderConfig, LayerSpec
from lamina_workers.attention_server import session as module
from lamina_workers.attention_server.session import warm_up

CPU = torch.device("cpu")


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("policy", ["", "streaming(sink=16, recent=64)", "page_top_k(budget=0.1)"])
def test_every_kind_of_attention_is_attended(kv_dtype, policy, caplog, monkeypatch):
    seen = []
    real = module.LocalAttention.send
    monkeypatch.setattr(
        module.LocalAttention, "send", lambda port, request: (seen.append(request), real(port, request))
    )
    layers = tuple(LayerSpec(n, 4, 2, 16, 32, 0.3, policies=(policy,) * 2 if policy else ()) for n in range(2))
    config = HolderConfig(layers, 16, kv_dtype, 1 << 20, sketches=policy.startswith("page"))
    with caplog.at_level(logging.DEBUG, logger="lamina"):
        warm_up(config, "float32", 1, CPU)
        assert len(seen) == 2 * 3
        warm_up(config, "float32", 1, CPU)  # once for each kind
    assert len(seen) == 2 * 3
    assert "could not be warmed up" not in caplog.text
