"""A model cut among ranks: every family computes what one process computes, and a rank that dies is noticed."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_child
import torch
from engine_rig import TINY, Tensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lamina_workers.decoder.model import Decoder
from lamina_workers.decoder.shard import WHOLE, Alone, Shard, rank_shape, with_ranks
from lamina_workers.decoder.weight_names import tensor_shapes
from lamina_workers.errors import RankLost, RanksError
from lamina_workers.model_config.config import ModelConfig
from lamina_workers.parallel.collectives import MOST_BYTES, Lines, Meeting, join

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied bfloat16": {"tie_word_embeddings": True},
    "llama biased, wide": {"attention_bias": True, "mlp_bias": True, "intermediate_size": 300, "vocab_size": 217},
    "llama with one KV head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 9},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen2 with two KV heads": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "qwen3 with one KV head": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 1},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 9},
    "gemma3 with one KV head": {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 9, "num_key_value_heads": 1},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5},
    "granite": {"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0.3, "attention_multiplier": 0.2},
    "ernie4_5": {"architectures": ["Ernie4_5ForCausalLM"], "use_bias": True},
    "seed_oss": {"architectures": ["SeedOssForCausalLM"]},
    "hunyuan": {"architectures": ["HunYuanDenseV1ForCausalLM"]},
    "glm4": {"architectures": ["Glm4ForCausalLM"]},
    "cohere2": {"architectures": ["Cohere2ForCausalLM"], "sliding_window": 9},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 50,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
    },
    "gpt_oss with one KV head": {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 1,
    },
    "llama with narrow values": {"v_head_dim": 10, "attention_bias": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each family; all numbers are random, so that a wrong one shows."""
    root = tmp_path_factory.mktemp("families")
    for seed, (name, overrides) in enumerate(FAMILIES.items()):
        folder = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(TINY | overrides))
        config = ModelConfig.from_folder(folder)
        tensors, generator = Tensors(config, seed), torch.Generator().manual_seed(seed)
        save_file(
            {
                name: x + torch.randn(x.shape, generator=generator) * 0.3 if x.ndim == 1 else x
                for name in tensors.names()
                for x in (tensors.tensor(name),)
            },
            folder / "model.safetensors",
        )
    return root


def start(rank: int, ranks: int, root: Path, *job: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, rank_child.__file__, str(rank), str(ranks), str(root), *job]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return json.loads(out)


def run(ranks: int, root: Path, *job: str) -> list[Any]:
    """What each rank says."""
    for meeting in root.glob("meeting.*"):  # of an earlier job, where a rank ended before it counted itself out
        meeting.unlink()
    children = [start(rank, ranks, root, *job) for rank in range(ranks)]
    try:
        return [answer(child) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_family_computes_what_one_process_computes(root: Path, ranks: int) -> None:
    """3 KV heads on 2 ranks, 1 and 2 KV heads on 2 and 3, 2 experts on 3: each cut that there is."""
    # First here: the ranks find the kernels compiled, where each of them compiled the same ones.
    right = {name: rank_child.logits(root / name, None, WHOLE) for name in FAMILIES}
    answers = run(ranks, root, "families")
    for name, expected in right.items():
        shapes = [said["shapes"][name] for said in answers]
        assert shapes == [list(expected.shape), *[[0, expected.shape[1]]] * (ranks - 1)]
        for found in load_file(root / f"{name}.of{ranks}.safetensors").values():
            if "bfloat16" in name:
                assert (found - expected).abs().mean() < 0.02 * expected.std()
            else:
                torch.testing.assert_close(
                    found, expected, rtol=0, atol=1e-4, msg=lambda text, at=name: f"{at}: {text}"
                )
    for said in answers:
        assert said["sums"] == []
        assert said["seconds"] > 0
    check_reads(root, ranks, [said["read"] for said in answers])


def check_reads(root: Path, ranks: int, read: list[dict[str, int]]) -> None:
    """Together the ranks read each tensor once, those that each of them needs once a rank; an embedding that stays a
    view is not read."""
    for name in FAMILIES:
        config = ModelConfig.from_folder(root / name)
        if with_ranks(config, ranks).kv_copies > 1:
            continue  # a copied head is read by each that has it
        expected = 0
        for tensor, shape in tensor_shapes(config).items():
            everywhere = tensor.endswith(("norm.weight", ".gate.weight", "_expert_gate.weight"))
            everywhere |= ".mlp.router." in tensor
            if tensor == "model.embed_tokens.weight" and not config.tie_word_embeddings:
                continue
            expected += math.prod(shape) * 4 * (ranks if everywhere else 1)
        assert sum(of[name] for of in read) == expected, name


@pytest.mark.real
def test_a_rank_that_dies_is_noticed_at_once_and_replaced(tmp_path: Path) -> None:
    check_lost(tmp_path, "kill", 0.0, 10.0)


@pytest.mark.real
def test_a_rank_that_hangs_is_noticed_when_the_deadline_passes(tmp_path: Path) -> None:
    check_lost(tmp_path, "stop", 1.5, 10.0)


def check_lost(folder: Path, how: str, least: float, most: float) -> None:
    children = [start(rank, 3, folder, "lost", how) for rank in range(3)]
    try:
        if how == "kill":
            assert children[2].wait(60) == -signal.SIGKILL
        else:
            os.waitid(os.P_PID, children[2].pid, os.WSTOPPED | os.WNOWAIT)
        children.append(start(2, 3, folder, "again"))
        survivors = [answer(children[rank]) for rank in (0, 1)]
        assert answer(children[3]) == {"sum": 111.0}
    finally:
        for child in children:
            child.kill()
            child.communicate()
    for rank, said in enumerate(survivors):
        assert said["message"].startswith(f"rank {rank} lost rank ")
        assert least <= said["took"] <= most
        assert said["left"] == f"rank {rank} has left its group"
        assert said["sum"] == 111.0


def test_who_meets_no_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match=r"rank 0 of 2 could not meet the others within 0\.3 s"):
        join(0, 2, Meeting(0, path=str(tmp_path / "meeting")), 0.3)


class Pair:
    """The lines of two ranks, which swap their cards through queues. Rank 1 is made in a thread."""

    def __init__(self, timeout: float, meddle: Callable[[int], None] = lambda port: None) -> None:
        boxes = [queue.SimpleQueue[bytes]() for _ in range(2)]

        def swap(rank: int, card: bytes) -> dict[int, bytes]:
            if rank == 0:
                meddle(json.loads(card)[1])
            boxes[1 - rank].put(card)
            return {1 - rank: boxes[rank].get(timeout=20)}

        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(Lines, 1, 2, "127.0.0.1", partial(swap, 1), 20.0)
            self.first = Lines(0, 2, "127.0.0.1", partial(swap, 0), timeout)
            self.second = second.result()

    def exchange(self, size: int) -> tuple[bytes, bytes]:
        """What rank 0 and rank 1 receive when they send ones and twos."""
        found = bytearray(size), bytearray(size)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(self.second.exchange, memoryview(b"\2" * size), {0: memoryview(found[1])})
            self.first.exchange(memoryview(b"\1" * size), {1: memoryview(found[0])})
            second.result()
        return bytes(found[0]), bytes(found[1])

    def close(self) -> None:
        self.first.close()
        self.second.close()


def test_a_stranger_on_the_line_is_turned_away() -> None:
    strangers = []

    def meddle(port: int) -> None:
        for said in (b"", bytes(16) + (1).to_bytes(4, "little")):
            stranger = socket.create_connection(("127.0.0.1", port), 5)
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            strangers.append(stranger)

    silent = []

    def meddle_and_stay(port: int) -> None:
        meddle(port)
        reset = socket.create_connection(("127.0.0.1", port), 5)
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
        for said in (b"", b"half"):
            silent.append(socket.create_connection(("127.0.0.1", port), 5))
            silent[-1].sendall(said)

    begun = time.monotonic()
    pair = Pair(20.0, meddle_and_stay)
    assert time.monotonic() - begun < 10
    strangers += silent
    for size in (1, 1000, MOST_BYTES):
        assert pair.exchange(size) == (b"\2" * size, b"\1" * size)
    for stranger in strangers:
        with contextlib.suppress(ConnectionResetError):  # where what it said was not read
            assert stranger.recv(1) == b""
        stranger.close()
    pair.close()


def test_a_line_that_is_silent_or_closed_is_lost() -> None:
    pair = Pair(0.2)
    view = memoryview(bytearray(4))
    with pytest.raises(RankLost, match=r"rank 0 lost rank 1 of 2: nothing for 0\.2 s"):
        pair.first.exchange(view, {1: view})

    def exchange_until_lost() -> None:
        for _ in range(3):  # what was sent before comes first
            pair.second.exchange(view, {0: view})

    with pytest.raises(RankLost, match="rank 1 lost rank 0 of 2"):
        exchange_until_lost()
    pair.close()


@pytest.mark.parametrize("places", [{}, {"path": "x", "port": 1}])
def test_a_meeting_is_at_one_place(places: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a path or a port"):
        Meeting(0, **places)


def test_one_rank_needs_no_group() -> None:
    group = join(0, 1, Meeting(0, path="nowhere"), 1.0)
    assert isinstance(group, Alone)
    x = torch.ones(3, 4)
    assert group.all_reduce(x) is x
    assert group.gather_columns(x, [4]) is x


def test_a_decoder_takes_only_its_own_rank_s_group() -> None:
    config = ModelConfig.from_dict(TINY)
    with pytest.raises(ValueError, match="rank 1 of 2 got a collective of rank 0 of 1"):
        Decoder.load(config, Tensors(config), torch.float32, shard=Shard(1, 2))


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ({}, 7, "cut among 7 ranks: it has 6 query heads, so 1 to 6"),
        ({}, 0, "cut among 0 ranks: it has 6 query heads, so 1 to 6"),
        ({"vocab_size": 4}, 5, "cut among 5 ranks: it has 4 tokens in its vocabulary, so 1 to 4"),
        ({"intermediate_size": 3}, 5, "cut among 5 ranks: it has 3 columns in its MLPs, so 1 to 3"),
    ],
)
def test_too_many_ranks_are_refused(overrides: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(RanksError, match=message) as caught:
        with_ranks(ModelConfig.from_dict(TINY | overrides), ranks)
    assert isinstance(caught.value, ValueError)


def test_ranks_that_do_not_exist_are_refused() -> None:
    for rank, ranks in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            Shard(rank, ranks)
    with pytest.raises(ValueError, match="4 ranks cannot share 3 KV heads"):
        rank_shape(ModelConfig.from_dict(TINY), Shard(3, 4))


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 12), experts=st.integers(1, 9), data=st.data())
def test_ranks_share_everything_once(kv_heads: int, group: int, experts: int, data: st.DataObject) -> None:
    heads = kv_heads * group
    ranks = data.draw(st.integers(1, heads))
    more = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": 1000}
    moe = {"architectures": ["MixtralForCausalLM"], "num_local_experts": experts, "num_experts_per_tok": 1}
    plain = ModelConfig.from_dict(TINY | more | moe | {"vocab_size": 1003})
    config = with_ranks(plain, ranks)
    assert config == replace(plain, num_key_value_heads=kv_heads * config.kv_copies, kv_copies=config.kv_copies)
    assert tensor_shapes(config) == tensor_shapes(plain)
    assert group % config.kv_copies == 0
    assert with_ranks(config, ranks) is config
    fewer = [n for n in range(1, config.kv_copies) if group % n == 0]
    assert all(kv_heads * n < ranks for n in fewer)
    shapes = [rank_shape(config, Shard(rank, ranks)) for rank in range(ranks)]
    whole = {"heads": heads, "kv_heads": config.num_key_value_heads, "columns": 1000, "experts": experts}
    for name, total in (whole | {"vocabulary": 1003}).items():
        parts = [getattr(shape, name) for shape in shapes]
        assert [thing for part in parts for thing in part] == list(range(total))
        if name in ("heads", "kv_heads", "columns", "vocabulary"):
            assert all(parts)
    for shape in shapes:
        kept = {head // (heads // config.num_key_value_heads) for head in shape.heads}
        assert kept == set(shape.kv_heads)


def test_one_file_alone_knows_how_ranks_talk() -> None:
    top = Path(__file__).parents[3]
    packages = ("lamina", "workers/lamina_workers", "kernels/lamina_kernels", "protocols/lamina_protocols")
    for file in (file for package in packages for file in (top / package).rglob("*.py")):
        if file.name == "collectives.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                base = getattr(node, "module", None) or ""
                names = [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
                assert not any(name.startswith("torch.distributed") for name in names), file
