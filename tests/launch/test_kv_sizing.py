"""What holders of a model's KV are told of the policy, and how much memory each has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_workers import write_tiny_model

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest, PolicyError
from lamina.launch.kv_sizing import Sizes, holder_config, page_groups, size_kv
from lamina.launch.model_files import load
from lamina.system.machine import this_machine
from lamina_protocols.messages.layers import HolderConfig
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.policies.catalogue import parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def holder(folder: Path, policy: str, copies: int = 1) -> HolderConfig:
    model = ModelConfig.from_folder(folder)
    model = replace(model, num_key_value_heads=model.num_key_value_heads * copies, kv_copies=copies)
    config = EngineConfig(policy=policy, kv_memory="4MiB", page_size=16)
    return holder_config(folder, model, config, torch.float32, this_machine())


@pytest.mark.parametrize("copies", [1, 2])
def test_a_text_for_all_heads_gives_each_its_own(folder: Path, copies: int) -> None:
    told = holder(folder, "sharded(block=16, stride=5, offset=1, step=2)", copies)
    for spec in told.layers:
        heads = [parse(text) for text in spec.policies]
        assert [head.offset for head in heads] == [  # type: ignore[attr-defined]
            (1 + 2 * head) % 5 for head in range(spec.kv_heads // copies) for _ in range(copies)
        ]
    (groups,) = page_groups(told)
    assert sum(group.cells(tuple(range(told.layers[0].kv_heads))) for group in groups) == len(told.layers) * len(heads)


def test_blocks_that_are_no_whole_pages_are_refused(folder: Path) -> None:
    with pytest.raises(PolicyError, match=r"dilated: block is 24; allowed are multiples of the page size, 16"):
        HeadPolicies.of(holder(folder, "dilated(block=24, sink=0)"))


def test_the_engines_own_process_may_have_less_kv_than_its_workers(folder: Path) -> None:
    def sizes(**more: object) -> Sizes:
        config = EngineConfig(attention_workers=2, kv_memory="4MiB", max_num_seqs=8, **more)  # type: ignore[arg-type]
        return size_kv(load(folder, config, None), config, this_machine())

    alike, less = sizes(), sizes(kv_local="1MiB")
    assert [each.kv_memory for each in (*alike.seats, *alike.ranks)] == [4 << 20, 4 << 20]
    assert [each.kv_memory for each in (*less.seats, *less.ranks)] == [4 << 20, 1 << 20]
    assert less.limits.max_sequences == 8
    with pytest.raises(InvalidRequest, match="kv_local is 1 bytes; allowed are"):
        sizes(kv_local=1)
