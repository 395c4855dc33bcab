"""What proposes drafts is built from a config, or refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_families import written
from real_workers import write_tiny_model

from lamina.config import EngineConfig
from lamina.engine.draft_model import DraftModelProposer
from lamina.engine.drafting import NgramProposer, Wanted
from lamina.errors import InvalidRequest, NotEnoughMemory
from lamina.kv.request import Request, ScheduledSequence
from lamina.launch.kv_sizing import size_kv
from lamina.launch.model_files import load
from lamina.launch.speculation import find_drafts, load_proposer
from lamina.messages.engine_request import EngineRequest
from lamina.sampling_params import SamplingParams
from lamina.system.machine import this_machine
from lamina_workers.checkpoints.weight_loader import UNPACKED


def _built(model: Path, speculate: str | Path, **settings: Any) -> Any:
    config = EngineConfig(dtype="float32", kv_memory="4MiB", speculate=speculate, **settings)
    files = load(model, config, None)
    try:
        sizes = size_kv(files, config, this_machine())
        return load_proposer(find_drafts(files, sizes, config, None), sizes, config, None)
    finally:
        files.tokenizer.close()


def _wanted(tokens: list[int]) -> Wanted:
    request = Request("r", tuple(tokens), 100)
    return Wanted(ScheduledSequence(request, 0, 0, tokens), EngineRequest(request, SamplingParams(temperature=0), 0), 3)


def test_ngrams_need_no_model(model: Path) -> None:
    assert isinstance(_built(model, "ngram"), NgramProposer)


def test_a_draft_model_is_loaded_with_kv_of_its_own(model: Path, tmp_path: Path) -> None:
    small = write_tiny_model(tmp_path / "small", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    proposer = _built(model, small)
    assert isinstance(proposer, DraftModelProposer)
    (drafts,) = proposer.propose([_wanted([4, 5, 6] * 20)])
    assert len(drafts) == 3


def test_a_draft_model_that_does_not_fit_beside_the_model_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = write_tiny_model(tmp_path / "small", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    own, draft = (load(path, EngineConfig(), None).kept_bytes(torch.float32, UNPACKED) for path in (model, small))
    kv = (4 << 20) + (4 << 20) // 9  # 3 layers of 3 heads, 1 of 1
    for available, fits in ((own + draft + kv, True), (own + draft + kv - 1, False)):
        machine = replace(this_machine(), memory_available=available)
        monkeypatch.setattr("lamina.launch.speculation.this_machine", lambda machine=machine: machine)
        if fits:
            assert isinstance(_built(model, small), DraftModelProposer)
        else:
            with pytest.raises(NotEnoughMemory, match=f"small: the weights take {own + draft} bytes of memory"):
                _built(model, small)
            assert isinstance(_built(model, small, force=True), DraftModelProposer)


def test_another_vocabulary_is_refused_with_both_sizes(model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", vocab_size=90)
    with pytest.raises(InvalidRequest, match=r"vocabulary of 90 tokens, and the model one of 101; allowed"):
        _built(model, other)


def test_other_tokens_in_as_large_a_vocabulary_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other")
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["vocab"] = {("x" if number == 7 else word): number for word, number in data["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InvalidRequest, match="'x' for token 7 of its 101, and the model 'w7 '"):
        _built(model, other)


def test_an_embedding_with_padding_is_allowed(model: Path, tmp_path: Path) -> None:
    padded = write_tiny_model(tmp_path / "padded")
    config = json.loads((padded / "config.json").read_text())
    small = write_tiny_model(tmp_path / "small", vocab_size=128)
    (small / "tokenizer.json").write_text((padded / "tokenizer.json").read_text())
    assert config["vocab_size"] == 101
    (drafts,) = _built(padded, small).propose([_wanted([4, 5, 6])])
    assert all(draft < 101 for draft in drafts)


def test_a_draft_model_with_states_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hybrid"
    written("qwen3_next", folder)
    (folder / "tokenizer.json").write_text((model / "tokenizer.json").read_text())
    with pytest.raises(InvalidRequest, match="Qwen3NextForCausalLM has layers that keep a state: a draft model goes"):
        _built(model, folder)


def test_a_draft_model_that_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere"):
        _built(model, tmp_path / "nowhere")


def test_without_speculation_there_is_nothing(model: Path) -> None:
    config = EngineConfig(dtype="float32", kv_memory="4MiB")
    files = load(model, config, None)
    files.tokenizer.close()
    sizes = size_kv(files, config, this_machine())
    assert find_drafts(files, sizes, config, None) is None
    assert load_proposer(None, sizes, config, None) is None
