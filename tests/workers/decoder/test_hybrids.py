"""Families with layers that keep states: over attention workers, against transformers; and cut among ranks."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_attention import DenseAttention
from exchange_peers import Joints
from hybrid_families import FAMILIES
from reference_models import DECODED, PROMPT, Tensors, expected, load, reference
from safetensors.torch import load_file
from test_graphs import Again

from lamina_kernels.compile import programs
from lamina_kernels.dense import few_rows
from lamina_kernels.dense_spans import Spans
from lamina_protocols.messages.layers import STATES, HolderConfig
from lamina_protocols.messages.messages import Open, Row
from lamina_protocols.messages.pools import pools
from lamina_protocols.messages.routes import HolderBatch, Route, Span
from lamina_workers.attention_worker.attention_worker import AttentionWorker
from lamina_workers.decoder.graphs import Captured
from lamina_workers.decoder.model import Batch, Decoder, Forward, KeyValueReady, QueryReady, StateReady
from lamina_workers.decoder.sampler import RowSampling
from lamina_workers.decoder.shard import Shard, with_ranks
from lamina_workers.errors import ModelFileError, RanksError, UnsupportedModelError
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.model_worker.interface import BatchWork, result
from lamina_workers.model_worker.model_worker import ModelWorker

# Newer transformers would rather have it called `cache`, older ones know only this name.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")


Made = Callable[[str], tuple[transformers.PreTrainedModel, Path, Decoder]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of a family a model, its folder and its decoder, each made once."""

    @functools.cache
    def make(family: str) -> tuple[transformers.PreTrainedModel, Path, Decoder]:
        folder = tmp_path_factory.mktemp("family")
        model = reference(*FAMILIES[family])
        return model, folder, load(model, folder)

    return make


class OneSequence:
    """One sequence, whose heads are dealt among workers behind channels: in each pool, every n-th to one of n."""

    def __init__(self, decoder: Decoder, joints: Joints, holders: int) -> None:
        config = HolderConfig(tuple(decoder.config.layer_specs()), 16, "float32", 1 << 24)
        specs = [pool.config.layers[0] for pool in pools(config)]
        self.workers = [AttentionWorker(config) for _ in range(holders)]
        self.model_worker = ModelWorker(decoder, config, dict(enumerate(map(joints, self.workers))))
        self.heads = [[tuple(range(n, spec.kv_heads, holders)) for spec in specs] for n in range(holders)]
        self.keep_states = [spec.kind in STATES for spec in specs]
        self.length = 0

    def share(self, number: int, count: int) -> HolderBatch:
        """What one batch asks of a holder: rows of its parts, of which attention's are fused in decode."""
        start, end = self.length, self.length + count
        own = [(pool, heads) for pool, heads in enumerate(self.heads[number]) if heads]
        routes = []
        for pool, heads in own:
            upto = end if count == 1 and not self.keep_states[pool] else start
            row = Row(pool + 1, start, count, (0, upto) if upto else None, True)
            routes.append(Route(0, heads, row, (start, end), pool))
        opens = tuple(Open(pool + 1, pool, heads, 0, 1000) for pool, heads in own)
        return HolderBatch(len(opens) if start else 0, () if start else opens, tuple(routes))

    def run(self, tokens: list[int], again: bool = False) -> torch.Tensor:
        """Logits of the next tokens; `again`: their batch is announced and given up first."""
        count = len(tokens)
        shares = {number: self.share(number, count) for number in range(len(self.workers))}
        sampling = (RowSampling(),) * count
        work = BatchWork((Span(self.length, count),), (PROMPT,), tokens, tuple(range(count)), sampling)
        for _ in range(1 + again):
            batch, answers = self.model_worker.announce_now(shares)
            assert all(answer.accepted for answer in answers.values()), answers
            logits, _ = result(self.model_worker.compute(work, batch, shares))
        self.length += count
        return logits


@pytest.mark.parametrize("holders", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_over_workers_equals_transformers(family: str, holders: int, made: Made) -> None:
    """The prompt at once and in chunks, one of which runs twice, then decoded tokens, every second one twice."""
    model, _, decoder = made(family)
    tokens = torch.randint(3, 97, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(5)).tolist()
    wanted = expected(model, tokens)
    for chunks in ([PROMPT], [1, 7, PROMPT - 8]):
        with Joints() as joints:
            sequence = OneSequence(decoder, joints, holders)
            found = []
            for number, count in enumerate([*chunks, *[1] * DECODED]):
                some = tokens[sequence.length : sequence.length + count]
                found.append(sequence.run(some, again=number % 2 == 1))
            torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-4, atol=1e-4)
            for worker in sequence.workers:
                worker.check_integrity()


SPANS = {
    "qwen3_next": FAMILIES["qwen3_next"],
    "qwen3_5": FAMILIES["qwen3_5"],
    "qwen3_5_moe": FAMILIES["qwen3_5_moe"],
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, "num_hidden_layers": 4, "norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 8, "intermediate_size": 64, "num_hidden_layers": 4}),
}
WHOLE_REGISTERS = {"num_experts": 8, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}


@pytest.mark.parametrize("kind", SPANS)
def test_spans_change_no_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lamina_kernels.dense.dense", "lamina_workers.decoder.decoder_weights"):
        monkeypatch.setattr(f"{module}.repacks", lambda _: False)  # with AMX weights are repacked, and no span is used
    model_type, options = SPANS[kind]
    model = reference(model_type, options | WHOLE_REGISTERS if "num_experts" in options or "moe" in kind else options)
    decoder, taken = load(model, tmp_path, torch.bfloat16), []
    run = Spans.run
    monkeypatch.setattr(Spans, "run", lambda self, index, *given: taken.append(index) or run(self, index, *given))
    with torch.inference_mode():
        found = DenseAttention(decoder, 9)
        logits = [found.run(range(3 + at, 3 + at + count)) for at, count in ((0, 9), (9, 1), (10, 2))]
        if few_rows.can_multiply(torch.zeros(4, 32, dtype=torch.bfloat16)) and programs.can_run():
            assert taken == [*range(5)] * 3
        monkeypatch.setattr("lamina_workers.decoder.model.decoder_spans", lambda *_, **__: None)
        plain = DenseAttention(load(model, tmp_path, torch.bfloat16), 9)
        for expected, (at, count) in zip(logits, ((0, 9), (9, 1), (10, 2)), strict=True):
            assert torch.equal(plain.run(range(3 + at, 3 + at + count)), expected)


class Threads:
    """The group of ranks that are threads of this process."""

    def __init__(self, rank: int, parts: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.ranks, self.seconds = rank, len(parts), 0.0
        self._parts, self._barrier = parts, barrier

    def _exchanged(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self.rank] = x.clone()
        self._barrier.wait()
        found = list(self._parts)
        self._barrier.wait()
        return found

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchanged(x)).sum(0)

    def gather_columns(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
        parts = self._exchanged(x)
        return None if self.rank else torch.cat(parts, -1)

    def close(self) -> None:
        self._barrier.abort()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compute_what_one_process_computes(family: str, ranks: int, made: Made) -> None:
    """Heads of q and k stand once on each rank, or are shared by several."""
    _, folder, alone = made(family)
    tensors = Tensors(load_file(folder / "model.safetensors"))
    config = with_ranks(ModelConfig.from_folder(folder), ranks)
    parts, barrier = [torch.empty(0)] * ranks, threading.Barrier(ranks, timeout=60)
    tokens, counts = [(7 * i) % 97 for i in range(30)], [9, 20, 1]

    def run(decoder: Decoder) -> torch.Tensor:
        with torch.inference_mode():
            sequence = DenseAttention(decoder, len(tokens))
            return torch.cat([sequence.run(tokens[sequence.length :][:count]) for count in counts])

    found: dict[int, torch.Tensor] = {}

    def child(rank: int) -> None:
        try:
            group = Threads(rank, parts, barrier)
            decoder = Decoder.load(config, tensors, torch.float32, shard=Shard(rank, ranks), collective=group)
            found[rank] = run(decoder)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=child, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found[0], run(alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize("query_first", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_from_each_mixer(family: str, query_first: bool, made: Made) -> None:
    """Before it, and behind it: from what lives across it, in another run, as graphs or not."""
    *_, decoder = made(family)
    batch = Batch(torch.arange(5) * 7 % 97, torch.arange(5), torch.tensor([4, 0]))
    with torch.inference_mode():
        events, logits = driven(decoder.forward(batch, query_first=query_first), decoder.config)
        assert [event.layer for event in events] == list(range(len(decoder.config.layer_specs())))
        for event in events:
            assert event.hidden is not None
            for other in (decoder, Captured(decoder, Again)):
                attended = answer(event, decoder.config)
                rest = other.forward(batch, event.hidden, event.layer, attended, query_first)
                torch.testing.assert_close(driven(rest, decoder.config)[1], logits, rtol=0, atol=1e-5)
                rest = other.forward(batch, event.hidden, event.layer, None, query_first)
                torch.testing.assert_close(driven(rest, decoder.config)[1], logits, rtol=0, atol=1e-5)


def answer(event: KeyValueReady | StateReady, config: ModelConfig) -> torch.Tensor:
    """Some output of a mixer, which depends on what the decoder gives for it."""
    spec = config.layer_specs()[event.layer]
    if isinstance(event, StateReady):
        factor = 1 + event.gates.sum((1, 2)).tanh().unsqueeze(-1)
        return (event.x[:, -spec.heads * spec.d_v :] * factor).to(event.x.dtype)
    mixed = event.k[..., : spec.d_v].sigmoid() + (event.v if event.v.shape[-1] else 0)
    return mixed.repeat_interleave(spec.group, 1).flatten(1)


def driven(forward: Forward, config: ModelConfig) -> tuple[list[KeyValueReady | StateReady], torch.Tensor]:
    """The events that are answered, and the logits."""
    events: list[KeyValueReady | StateReady] = []
    try:
        event = next(forward)
        while True:
            if isinstance(event, QueryReady):
                event = next(forward)
                continue
            events.append(event)
            event = forward.send(answer(event, config))
    except StopIteration as end:
        return events, end.value


def small(family: str, **changes: Any) -> ModelConfig:
    kind, options = FAMILIES[family]
    model = reference(kind, options)
    return ModelConfig.from_dict({**model.config.to_dict(), **changes})


def test_mixers_are_numbered_as_they_come() -> None:
    specs = small("minimax").layer_specs()
    assert [spec.kind for spec in specs] == ["attention", "lightning", "lightning"]
    assert [spec.kv_layer for spec in specs] == [0, 1, 2]
    assert len(specs[1].decays) == specs[1].kv_heads
    assert all(0 > later > before for before, later in zip(specs[1].decays, specs[2].decays, strict=True))


def test_says_what_is_not_supported() -> None:
    with pytest.raises(UnsupportedModelError, match="layer_types has 'other'; allowed: 'full_attention', 'linear_att"):
        small("minimax", layer_types=["other", "full_attention", "linear_attention"])
    with pytest.raises(UnsupportedModelError, match="a state has 24 x 24 numbers; allowed of each: multiples of 16"):
        small("minimax", head_dim=24)
    with pytest.raises(RanksError, match="5 ranks"):
        with_ranks(small("minimax"), 5)


def test_text_of_a_model_for_pictures_too(made: Made) -> None:
    """Its config is nested, its names have a prefix, its experts are stacked, and other tensors stand beside them."""
    _, folder, plain = made("qwen3_5_moe")
    found = load_file(folder / "model.safetensors")
    named = {name.replace("model.", "model.language_model."): tensor for name, tensor in found.items()}
    for layer in range(4):
        at = f"model.language_model.layers.{layer}.mlp.experts"
        gates, ups, downs = (
            torch.stack([named.pop(f"{at}.{expert}.{part}_proj.weight") for expert in range(5)])
            for part in ("gate", "up", "down")
        )
        named |= {f"{at}.gate_up_proj": torch.cat((gates, ups), 1), f"{at}.down_proj": downs}
    named |= {"model.visual.patch": torch.zeros(3), "mtp.norm.weight": torch.zeros(3)}
    text = json.loads((folder / "config.json").read_text())
    del text["architectures"]
    text["rope_parameters"] |= {"mrope_section": [1, 1, 1], "mrope_interleaved": True}
    raw = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "text_config": text}
    decoder = Decoder.load(ModelConfig.from_dict(raw), Tensors(named), torch.float32)
    with torch.inference_mode():
        logits = [DenseAttention(each, 20).run(range(20)) for each in (plain, decoder)]
    assert torch.equal(*logits)


def test_kinds_of_layers_as_older_configs_write_them() -> None:
    for kinds in (["mamba", "mlp", "attention", "mamba", "mlp", "mlp"], "M-*M--"):
        name = "layers_block_type" if isinstance(kinds, list) else "hybrid_override_pattern"
        found = small("nemotron_h", **{"layers_block_type": None, "num_hidden_layers": 6, name: kinds})
        assert found.mixers == small("nemotron_h").mixers == (("state",), (), ("attention",), ("state",), (), ())
    granite = small("granite 4", layer_types=["mamba", "attention", "mamba", "mamba"])
    assert granite.mixers == small("granite 4").mixers
    assert [spec.kind for spec in small("falcon_h1").layer_specs()] == ["mamba2", "attention"] * 3


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("nemotron_h", {"hybrid_override_pattern": "M-X"}, "layer_types has 'X'; allowed: 'full_attention'"),
        (
            "nemotron_h",
            {"layers_block_type": ["mlp", "mamba"]},
            "the first layer is 'mlp'; allowed: attention or a state",
        ),
        (
            "granite 4",
            {"layer_types": ["mlp"] * 4},
            "layer_types has 'mlp'; allowed: 'full_attention', 'linear_attention'",
        ),
        ("falcon_h1", {"attention_bias": True}, "attention_bias is not supported with attention_in_multiplier"),
        ("falcon_h1", {"mamba_proj_bias": True}, "mamba_proj_bias is not supported with ssm_multipliers"),
        ("qwen3_next", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_pytorch_tanh' is not supported"),
        ("nemotron_h", {"mamba_hidden_act": "gelu"}, "mamba_hidden_act 'gelu' is not supported with states"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "hidden_act 'silu' is not supported; supported: 'relu2'"),
    ],
)
def test_says_what_a_family_does_not_support(family: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModelError, match=complaint):
        small(family, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("qwen3_next", {"linear_num_key_heads": 3}, "a state layer has 4 heads; allowed: multiples of 3, of its q"),
        ("granite 4", {"mamba_n_groups": 3}, "mamba_n_groups 3 must divide mamba_n_heads 4"),
        ("granite 4", {"mamba_d_head": 16}, "mamba_n_heads 4 of 16 numbers are 64; allowed: 128"),
        ("granite 4", {"layer_types": ["mamba"] * 3}, "num_hidden_layers is 4, expected 3 as kinds"),
        ("granite 4", {"time_step_limit": [1, 0]}, r"time_step_limit is \[1, 0\], expected two numbers"),
        ("granite 4", {"layer_types": "mamba"}, "layer_types is 'mamba', expected a list of kinds"),
    ],
)
def test_says_what_is_wrong(family: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelFileError, match=complaint):
        small(family, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_float32(family: str, made: Made) -> None:
    """Where rounding changes which experts a token takes, that is not very near."""
    model, folder, exact = made(family)
    rounded = load(model, folder, torch.bfloat16)
    tokens = [(7 * i) % 97 for i in range(30)]
    with torch.inference_mode():
        expected, found = (DenseAttention(decoder, len(tokens)).run(tokens) for decoder in (exact, rounded))
        nothing = Batch(*[torch.arange(0)] * 3)
        assert driven(rounded.forward(nothing), rounded.config)[1].shape == (0, 97)
    assert (found - expected).abs().mean() < (0.2 if exact.config.moe else 0.1) * expected.std()
    assert (found - expected).abs().max() > 0
