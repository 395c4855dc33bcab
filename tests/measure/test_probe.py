"""A probe of models whose layers keep states beside KV: logits as transformers', and what a tap sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hybrid_families import FAMILIES
from reference_models import load, reference

from lamina.measure.probe import Probe
from lamina_protocols.messages.layers import HolderConfig

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "kimi_linear"])
def test_a_probe_of_layers_of_several_kinds(family: str, tmp_path: Path) -> None:
    model = reference(*FAMILIES[family])
    decoder = load(model, tmp_path)
    specs = decoder.config.layer_specs()
    probe = Probe(decoder.config, decoder, HolderConfig(specs, 16, "float32", 1 << 24))
    tokens, tapped, outputs = [5, 80, 7, 31, 12, 9, 44], list[int](), list[int]()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0]
    handle, other = probe.open(), probe.open()
    torch.testing.assert_close(probe.read(handle, tokens[:5]), expected[:5], atol=2e-4, rtol=1e-3)
    probe.read(other, tokens[:6])
    found = probe.step(
        [(other, tokens[6]), (handle, tokens[5])],
        lambda layer, q, k, v: tapped.append(layer),
        lambda layer, out: outputs.append(layer),
    )
    torch.testing.assert_close(found, expected[[6, 5]], atol=2e-4, rtol=1e-3)
    assert tapped == outputs == [i for i, spec in enumerate(specs) if spec.kind in ("attention", "latent")]
    probe.close(handle)
    assert probe.usage(other) is None  # no head has a policy
