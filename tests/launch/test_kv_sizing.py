"""What holders of a model's KV are told of the policy, how much memory each has, and which policies requests may
name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest, NotEnoughMemory, PolicyError
from lamina.kv.pages import PageGroup
from lamina.kv.request import SchedulerConfig
from lamina.launch.checks import cut_options
from lamina.launch.kv_sizing import RequestPolicies, Sizes, holder_config, page_groups, size_kv
from lamina.launch.model_files import load
from lamina.system.machine import this_machine
from lamina.system.text_files import show_size
from lamina_protocols.frames import bounds
from lamina_protocols.messages.layers import HolderConfig, Index, LayerSpec
from lamina_workers.checkpoints.weight_loader import Packing
from lamina_workers.kv_pages.head_policies import HeadPolicies
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.policies.catalogue import POLICIES, parse
from lamina_workers.policies.policy import Windowed

BOTH = frozenset((0, 1))
INDEX = Index(16, 1, 16, 4)


def holder(model: Path, policy: str, copies: int = 1) -> HolderConfig:
    read = ModelConfig.from_folder(model)
    copied = replace(read, num_key_value_heads=read.num_key_value_heads * copies, kv_copies=copies)
    config = EngineConfig(policy=policy, kv_memory="4MiB", page_size=16)
    return holder_config(model, copied, config, torch.float32, this_machine())


@pytest.mark.parametrize("copies", [1, 2])
def test_a_text_for_all_heads_gives_each_its_own(model: Path, copies: int) -> None:
    told = holder(model, "sharded(block=16, stride=5, offset=1, step=2)", copies)
    for spec in told.layers:
        heads = [parse(text) for text in spec.policies]
        assert [head.offset for head in heads] == [  # type: ignore[attr-defined]
            (1 + 2 * head) % 5 for head in range(spec.kv_heads // copies) for _ in range(copies)
        ]
    (groups,) = page_groups(told)
    assert sum(group.cells(tuple(range(told.layers[0].kv_heads))) for group in groups) == len(told.layers) * len(heads)


def test_blocks_that_are_no_whole_pages_are_refused(model: Path) -> None:
    with pytest.raises(PolicyError, match=r"dilated: block is 24; allowed are multiples of the page size, 16"):
        HeadPolicies.of(holder(model, "dilated(block=24, sink=0)"))


def test_a_batch_is_cut_to_what_frames_carry(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that filled a batch of `max_batch_tokens` failed, and eight of them ended the engine."""

    def limits(**options: object) -> SchedulerConfig:
        config = EngineConfig(kv_memory="4MiB", attention_workers=1, **options)  # type: ignore[arg-type]
        return size_kv(load(model, config, None), config, this_machine()).limits

    monkeypatch.setattr(bounds, "MAX_PAYLOAD", 1 << 26)  # the model is tiny
    asked: dict[str, object] = {"max_batch_tokens": 1 << 20, "max_num_seqs": 1 << 16}
    alone = limits(**asked)
    assert alone.max_batch_tokens == alone.frame_tokens < 1 << 20
    assert alone.max_sequences == alone.max_parts < 1 << 16
    config = EngineConfig(**asked)  # type: ignore[arg-type]
    assert list(cut_options(config, alone)) == [
        f"max_batch_tokens=1048576 is cut to {alone.frame_tokens}, as many as the frames of a batch carry",
        f"max_num_seqs=65536 is cut to {alone.max_parts}, as many as the frames of a batch carry",
    ]
    ranks = limits(model_workers=2, **asked)
    assert ranks.max_batch_tokens == ranks.frame_tokens == bounds.MAX_COMMANDED_TOKENS
    monkeypatch.setattr(bounds, "MAX_PAYLOAD", 101 * 4 * 9 * 50)
    replicas = limits(model_workers=2, model_parallel="replicas", speculate="ngram", **asked)
    assert replicas.max_sequences == 50  # the logits of 50 rows with eight drafts each
    assert replicas.max_parts == alone.max_parts  # a row may have several
    assert "max_num_seqs=65536 is cut to 50, as many as the frames of a batch carry" in cut_options(config, replicas)
    monkeypatch.undo()
    usual = limits()
    assert (usual.max_batch_tokens, usual.max_sequences) == (1024, 256)
    assert not list(cut_options(EngineConfig(), usual))


def test_the_engines_own_process_may_have_less_kv_than_its_workers(model: Path) -> None:
    def sizes(**more: object) -> Sizes:
        config = EngineConfig(attention_workers=2, kv_memory="4MiB", max_num_seqs=8, **more)  # type: ignore[arg-type]
        return size_kv(load(model, config, None), config, this_machine())

    alike, less = sizes(), sizes(kv_local="1MiB")
    assert [each.kv_memory for each in (*alike.seats, *alike.ranks)] == [4 << 20, 4 << 20]
    assert [each.kv_memory for each in (*less.seats, *less.ranks)] == [4 << 20, 1 << 20]
    assert less.limits.max_sequences == 8
    with pytest.raises(InvalidRequest, match="kv_local is 1 bytes; allowed are"):
        sizes(kv_local=1)


def test_what_does_not_fit_is_refused_unless_it_is_forced(model: Path) -> None:
    """KV takes 256 MiB by default where memory is short."""

    def sizes(available: int, **more: object) -> Sizes:
        config = EngineConfig(dtype="float32", **more)  # type: ignore[arg-type]
        machine = replace(this_machine(), memory=1 << 36, memory_available=available)
        return size_kv(load(model, config, None), config, machine)

    weights = load(model, EngineConfig(), None).kept_bytes(torch.float32, Packing())
    assert sizes(1 << 30).holder.kv_memory == 1 << 28
    with pytest.raises(
        NotEnoughMemory, match=f"take {show_size(weights)} of memory and KV up to 256 MiB, and 256 MiB "
    ):
        sizes(1 << 28)
    assert sizes(1 << 28, force=True).holder.kv_memory == 1 << 28
    assert sizes(1 << 28, kv_memory="16MiB").holder.kv_memory == 1 << 24
    with pytest.raises(NotEnoughMemory, match="kv_memory that takes 48 MiB, fewer bits"):
        sizes(weights + (3 << 24), kv_memory="16MiB", attention_workers=3)
    twice = {"model_workers": 2, "model_parallel": "replicas", "kv_memory": "1MiB", "attention_workers": 1}
    with pytest.raises(NotEnoughMemory, match=f"take {show_size(2 * weights)} of"):
        sizes(weights + (2 << 20), **twice)
    assert sizes(0).holder.kv_memory >= 1 << 28  # a system that does not say


def policies(
    own: str = "", window: int | None = None, sketches: bool = True, index: Index | None = None
) -> RequestPolicies:
    """Of an engine with two layers, the second of which has the window."""
    spec = LayerSpec(0, 4, 2, 16, 16, 0.25, policies=(own,) * 2 if own else (), index=index)
    holder = HolderConfig((spec, replace(spec, kv_layer=1, window=window)), 16, "float32", 1 << 20, sketches=sketches)
    return RequestPolicies(holder, partial(page_groups, holder))


@pytest.mark.parametrize("text", ["full", " full ", "streaming(sink=64,recent=256)", "streaming", "auto", "retrieval"])
def test_a_policy_has_one_name_however_it_is_written(text: str) -> None:
    of = policies("page_top_k")
    name = of(text).name
    assert name == str(parse("retrieval" if text == "auto" else text))
    assert of(name) == of(text)
    assert policies(name)(text).name == ""  # the engine's own


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_policy_makes_of_kv(name: str) -> None:
    of = policies("page_top_k" if name == "full" else "")(name)
    policy = parse(name)
    assert of.whole_prompts == (name not in ("streaming", "span", "sharded", "dilated"))
    assert of.chooses == policy.adaptive


def test_what_is_kept_follows_the_request_s_policy_within_the_model_s_windows() -> None:
    own = parse("streaming(sink=4, recent=40)")
    of = policies(str(own), window=8)
    assert of("").groups == ((PageGroup(1, own, BOTH), PageGroup(1, Windowed(own, 8), BOTH)),)
    assert of("full").groups == ((PageGroup(1, None, BOTH), PageGroup(1, Windowed(parse("full"), 8), BOTH)),)
    razor = parse("razor")
    assert of("razor").groups == ((PageGroup(1, None, BOTH), PageGroup(1, Windowed(razor, 8), BOTH)),)


def test_what_cannot_be_served_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(PolicyError, match="does not keep; allowed here are static policies, and any where"):
        policies(sketches=False)("page_top_k")
    assert policies("retrieval", sketches=False)("page_top_k").chooses
    with pytest.raises(PolicyError, match="builds an index of keys, which this engine does not; allowed here"):
        policies()("retrieval(index=graph)")
    assert policies("retrieval(index=graph, top=9)")("retrieval(index=graph)").chooses
    with pytest.raises(PolicyError, match="there is no policy 'x'; allowed are full"):
        policies()("x")
    with pytest.raises(PolicyError, match="allowed is none: the model's own index"):
        policies("full", index=INDEX)("streaming")
    assert policies("full", index=INDEX)("full").name == ""
