"""The settings of an engine: what is refused, and that lists of choices agree with what carries them out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lamina.config import DTYPES, KV_DTYPES, EngineConfig
from lamina.errors import InvalidRequest
from lamina.system.text_files import parse_size, show_size
from lamina_kernels.paged import pages
from lamina_protocols.messages.layers import ColdTier


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dtype", "int8", "auto, float32"),
        ("kv_dtype", "int4", "float8_e4m3fn"),
        ("page_size", 17, "16, 32"),
        ("page_size", True, "16, 32"),
        ("shard", "layers", "heads"),
        ("model_parallel", "pipeline", "tensor, replicas"),
        ("data_channel", "udp", "grpc, tcp"),
        ("worker_timeout", 0.05, "0.1 to 86400 seconds"),
        ("recovery_timeout", "1", "0.1 to 86400 seconds"),
        ("worker_linger", -1, "0 to 3600 seconds"),
        ("worker_linger", True, "0 to 3600 seconds"),
        ("journal", " ", "a folder, or None"),
        ("policy", 3, "a file ending in .toml"),
        ("speculate", " ", '"ngram", "mtp", a model, or None'),
        ("num_speculative_tokens", 17, "from 1 to 16"),
        ("device", "tpu", "cpu"),
        ("threads", 0, "from 1 to 1024"),
        ("deterministic", "yes", "True or False"),
        ("rope_scaling", "yarn", "a mapping"),
        ("kv_memory", "2 parsecs", "1 byte to 1 PiB"),
        ("kv_local", "much", "1 byte to 1 PiB"),
        ("max_num_seqs", 0, "an integer from 1 to 65536"),
        ("kv_cold", " ", "a folder on a disk, or None"),
        ("model_workers", 0, "1 to 1024"),
        ("model_workers", True, "1 to 1024"),
        ("attention_workers", ["a"], '"host:port"'),
        ("attention_workers", ["a:1", "a:1"], "different"),
        ("autoscale", (3, 1), "autoscale is (3, 1); allowed are two numbers"),
        ("autoscale", "1:3", "two numbers"),
        ("autoscale", (True, 3), "two numbers"),
        ("autoscale", (0, 1025), "from 0 to 1024"),
        ("lanes", 9, "1 to 8"),
        ("local_share", 1.5, "0 to 1"),
        ("query_first", True, "auto, always, never"),
        ("cluster", "", '"host:port" or None'),
    ],
)
def test_a_setting_is_refused_with_its_name_and_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        EngineConfig(**{name: value})
    assert name in str(refused.value)
    assert allowed in str(refused.value)


def test_speculation_has_a_most() -> None:
    assert EngineConfig().most_drafts == EngineConfig(num_speculative_tokens=3).most_drafts == 0
    assert EngineConfig(speculate="ngram").most_drafts == 8
    assert EngineConfig(speculate="ngram", num_speculative_tokens=3).most_drafts == 3


def test_autoscale_begins_with_the_number_given_or_the_least() -> None:
    config = EngineConfig(autoscale=[1, 3])  # type: ignore[arg-type]  # as JSON has it
    assert (config.autoscale, config.first_workers, config.most_workers, config.holders_here) == ((1, 3), 1, 3, 4)
    config = EngineConfig(autoscale=(0, 3), attention_workers=2)
    assert (config.first_workers, config.most_workers) == (2, 3)
    config = EngineConfig(attention_workers=2)
    assert (config.first_workers, config.most_workers, config.holders_here) == (2, 2, 3)


@pytest.mark.parametrize(
    ("given", "both"),
    [
        ({"attention_workers": 4}, "autoscale is 0 to 3 and attention_workers 4"),
        ({"attention_workers": ["h:1"]}, r"autoscale is 0 to 3 and attention_workers \('h:1',\)"),
        ({"local_share": 0}, "0 attention workers and local_share is 0"),
        ({"deterministic": True}, "0 attention workers and local_share is 0"),
        ({"model_workers": 2}, "0 attention workers and model_workers is 2"),
    ],
)
def test_autoscale_is_refused_beside_what_contradicts_it(given: dict[str, Any], both: str) -> None:
    with pytest.raises(InvalidRequest, match=both):
        EngineConfig(autoscale=(0, 3), **given)


@pytest.mark.parametrize(
    ("redundancy", "given", "both"),
    [
        ("replica", {"attention_workers": 1}, '"replica(1)" with 1 attention_workers; it takes 2'),
        ("replica(2)", {"attention_workers": ["h:1", "h:2"]}, '"replica(2)" with 2 attention_workers; it takes 3'),
        ("parity", {"autoscale": (1, 2)}, '"parity(2)" with 2 attention_workers; it takes 3'),
        ("parity(1)", {}, "redundancy is 'parity(1)'; allowed is parity(2) to parity(64)"),
        ("mirror", {}, "redundancy is 'mirror'; allowed is"),
    ],
)
def test_redundancy_that_so_many_workers_can_never_have_is_refused(
    redundancy: str, given: dict[str, Any], both: str
) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(both)):
        EngineConfig(redundancy=redundancy, **given)


def test_redundancy_may_need_workers_that_come_later() -> None:
    assert EngineConfig(redundancy="replica", autoscale=(1, 2)).redundancy == "replica"
    assert EngineConfig(redundancy="replica").redundancy == "replica"  # machines may join


def test_kv_can_be_kept_in_the_dtypes_that_kernels_have() -> None:
    assert {*KV_DTYPES} - {"auto"} == {str(dtype).removeprefix("torch.") for dtype in pages.DTYPES}
    assert {*DTYPES} < {*KV_DTYPES}


SIZES: dict[Any, int] = {7: 7, "500 MB": 500 * 10**6, " 1.5kib ": 1536, "512M": 2**29, "1TiB": 2**40}


@pytest.mark.parametrize(("text", "size"), (SIZES | dict.fromkeys(("2GiB", "2Gi"), 2**31)).items())
def test_sizes_are_bytes_or_text_with_a_unit(text: Any, size: int) -> None:
    assert parse_size("kv_memory", text) == size


def test_a_size_is_shown_cut_or_raised_so_that_it_can_be_given_again() -> None:
    sizes = (1000, 737280, 40000, 25276510208, 2**40, 11 * 2**40 // 2)
    shown = ["1000 bytes", "720 KiB", "40000 bytes", "23.54 GiB", "1 TiB", "5.5 TiB"]
    assert list(map(show_size, sizes)) == shown
    for size in (*sizes, 2**31 - 1, 2**30 + 1):
        assert parse_size("size", show_size(size).removesuffix("ytes")) <= size
        assert parse_size("size", show_size(size, up=True).removesuffix("ytes")) >= size


def test_deterministic_leaves_nothing_to_measuring_and_keeps_what_was_given() -> None:
    config = EngineConfig(deterministic=True, attention_workers=2)
    assert (config.prefix_cache, config.lanes, config.query_first, config.local_share) == (False, 1, "never", 0)
    assert EngineConfig(deterministic=True, attention_workers=2, lanes=2, local_share=0.5).lanes == 2


def test_a_cold_tier_keeps_its_share_of_any_memory_and_no_more_than_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EngineConfig().cold_tier(100, 50) is None
    folder = str(Path("x").absolute())
    assert EngineConfig(kv_cold="x").cold_tier(100, 50) == ColdTier(folder, 0.5)
    assert EngineConfig(kv_cold="x", kv_resident=30).cold_tier(100, 50) == ColdTier(folder, 0.3)
    assert EngineConfig(kv_cold=Path("x"), kv_resident="1 KiB").cold_tier(100, 50) == ColdTier(folder, 1.0)
