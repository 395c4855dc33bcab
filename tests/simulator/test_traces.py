"""Traces: what is published is read to the last digit, what is drawn is like it, and nothing wrong gets past."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_traces import reused_share, summary
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import InvalidRequest
from lamina.simulator.traces import files as trace_files
from lamina.simulator.traces.arrivals import (
    BLOCK,
    MAX_TOKENS,
    Arrival,
    Trace,
    all_at_once,
    blocks_of,
    closed_loop,
    head,
    scaled,
    split,
    spread,
    step_of,
    tokens,
)
from lamina.simulator.traces.catalogue import WINDOWS, file_of, trace, windows
from lamina.simulator.traces.files import read
from lamina.system.text_files import read_toml

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LAMINA_TEST_DATA", ROOT.parent / "shared" / "data")) / "traces"
PACKAGE = ROOT / "lamina" / "simulator" / "traces"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROW = "2023-11-16 18:15:46.6805900,374,44"
GOOD = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the published traces are not at {DATA}")
_arrivals = st.lists(
    st.builds(Arrival, st.floats(0, 1e6), st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=40
).map(lambda items: tuple(sorted(items, key=lambda item: item.at)))
_traces = st.builds(Trace, st.just("t"), _arrivals)


# What is published


@pytest.mark.parametrize(
    ("name", "count", "prompt", "output", "seconds"),
    [
        ("azure-conv", 19366, 1154.7, 211.1, 3501.721937),
        ("azure-code", 8819, 2047.8, 27.9, 3435.948056),
        pytest.param("mooncake-conversation", 12031, 12035.1, 342.6, 3536.999, marks=needs_data),
    ],
)
def test_published_traces_are_those_of_the_papers(
    name: str, count: int, prompt: float, output: float, seconds: float
) -> None:
    """Azure's come with the package."""
    path = file_of(name, DATA if name == "mooncake-conversation" else None)
    assert path is not None
    found = read(path, name)
    numbers = summary(found)
    assert found.name == name
    assert len(found.arrivals) == count
    assert (round(numbers["prompt_mean"], 1), round(numbers["output_mean"], 1)) == (prompt, output)
    assert found.arrivals[0].at == 0
    assert found.seconds == pytest.approx(seconds, abs=1e-9)
    assert min(min(arrival.prompt, arrival.output) for arrival in found.arrivals) >= 1


@needs_data
def test_shipped_traces_are_the_published_files() -> None:
    said = (PACKAGE / "LICENCE-azure.txt").read_text("utf-8")
    for name in ("azure_conv_2023.csv", "azure_code_2023.csv"):
        shipped = gzip.decompress((PACKAGE / f"{name}.gz").read_bytes())
        assert shipped == (DATA / name).read_bytes()
        assert f"{hashlib.sha256(shipped).hexdigest()}  {name}" in said
    assert "CC-BY 4.0" in said


def test_wheels_have_what_the_package_reads() -> None:
    """A wheel has the files beside modules that pyproject.toml names."""
    known = read_toml(ROOT / "pyproject.toml")["tool"]["setuptools"]["package-data"]["lamina.simulator.traces"]
    for path in PACKAGE.iterdir():
        if path.suffix not in (".py", "") and path.is_file():
            assert any(path.match(pattern) for pattern in known), path.name


@needs_data
def test_mooncake_shares_what_its_ids_say() -> None:
    found = trace("mooncake-conversation", folder=DATA)
    assert sum(len(arrival.blocks) for arrival in found.arrivals) == 288_500
    assert reused_share(found) == pytest.approx(105_710 / 288_500)
    assert all(len(arrival.blocks) == blocks_of(arrival.prompt) for arrival in found.arrivals)


@needs_data
def test_a_count_takes_the_head_of_a_published_trace() -> None:
    assert trace("azure-code", 3, folder=DATA).arrivals == read(DATA / "azure_code_2023.csv").arrivals[:3]
    with pytest.raises(InvalidRequest, match=r"count is 8820; allowed is 1 to 8819"):
        trace("azure-code", 8820, folder=DATA)


# Times that were rounded


@needs_data
def test_rounded_times_are_spread_within_their_step() -> None:
    path = file_of("mooncake-conversation", DATA)
    assert path is not None
    rounded, found = read(path), trace("mooncake-conversation", folder=DATA)
    assert step_of(rounded) == pytest.approx(3.0, abs=0.001)
    assert found.remarks == ("times were rounded to 3 s; they are spread within it by chance",)
    later = np.array([b.at - a.at for a, b in zip(rounded.arrivals, found.arrivals, strict=True)])
    assert later.min() > -0.01
    assert later.max() < 3.01
    assert len({arrival.at for arrival in found.arrivals}) == len(found.arrivals)
    assert [replace(a, at=0.0) for a in found.arrivals] == [replace(a, at=0.0) for a in rounded.arrivals]
    assert summary(found)["gap_cv"] ** 2 == pytest.approx(1.02, abs=0.02)  # 9.2 where they come at once
    assert not step_of(found)
    assert trace("mooncake-conversation", folder=DATA) == found


@settings(max_examples=30)
@given(step=st.sampled_from([0.1, 1.0, 60.0]), seed=st.integers(0, 9), jitter=st.booleans())
def test_any_step_is_found_where_it_matters(step: float, seed: int, jitter: bool) -> None:
    rng = np.random.default_rng(seed)
    exact = np.sort(rng.random(300) * 100 * step)
    at = np.floor(exact / step) * step + (rng.random(300) * 0.001 * step if jitter else 0)
    even = Trace("t", tuple(Arrival(float(when), 5, 5) for when in np.sort(at)))
    if not jitter:  # else hardly two have the same
        assert step_of(even) == pytest.approx(step, rel=1e-3)
    assert step_of(Trace("t", tuple(Arrival(float(when), 5, 5) for when in exact))) == 0
    assert spread(all_at_once(even)) == all_at_once(even)


def test_a_trace_that_is_not_here_is_named_with_where_it_is(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(InvalidRequest, match=r"--trace-dir\) with its file, conversation_trace.jsonl, from github"):
            trace("mooncake-conversation", 10, folder=folder)
    assert trace("azure-code", 10, folder=tmp_path).name == "azure-code"


# What makes one trace of another


@given(_traces, st.floats(1e-3, 1e3))
@settings(max_examples=50)
def test_scaling_changes_only_the_times(found: Trace, factor: float) -> None:
    faster = scaled(found, factor)
    assert faster.seconds == pytest.approx(found.seconds / factor)
    assert [(a.prompt, a.output) for a in faster.arrivals] == [(a.prompt, a.output) for a in found.arrivals]
    assert {arrival.at for arrival in all_at_once(found).arrivals} == {0.0}


@given(_traces, st.data())
@settings(max_examples=50)
def test_a_split_keeps_each_request_once(found: Trace, data: st.DataObject) -> None:
    replicas = data.draw(st.integers(1, len(found.arrivals)))
    parts = split(found, replicas)
    assert len(parts) == replicas
    sizes = [len(part.arrivals) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert tuple(parts[n % replicas].arrivals[n // replicas] for n in range(len(found.arrivals))) == found.arrivals
    assert head(found, replicas).arrivals == tuple(part.arrivals[0] for part in parts)


def test_a_closed_loop_is_users_who_wait_for_their_own() -> None:
    found = closed_loop(Trace("t", tuple(Arrival(float(n), 5 + n, 5) for n in range(5))), 2, 1.5)
    assert [(a.at, a.prompt, a.after, a.gap) for a in found.arrivals] == [
        (0.0, 5, None, 0.0), (0.0, 6, None, 0.0), (0.0, 7, 0, 1.5), (0.0, 8, 1, 1.5), (0.0, 9, 2, 1.5),
    ]  # fmt: skip
    one, two = split(found, 2)
    assert [a.after for a in one.arrivals] == [None, 0, 1]
    assert [a.prompt for a in two.arrivals] == [6, 8]
    for users, think, message in ((0, 1.0, "users is 0"), (6, 1.0, "users is 6"), (2, math.nan, "think is nan")):
        with pytest.raises(InvalidRequest, match=message):
            closed_loop(found, users, think)
    with pytest.raises(InvalidRequest, match="replicas is 3; allowed is 1 to 2, as t by 2 users has sessions"):
        split(found, 3)


def test_what_cannot_be_made_is_named() -> None:
    found = Trace("t", tuple(Arrival(float(n), 5, 5) for n in range(3)))
    for factor in (0, -1.0, math.nan, math.inf):
        with pytest.raises(InvalidRequest, match="rate_factor is"):
            scaled(found, factor)
    with pytest.raises(InvalidRequest, match="finite numbers from 0 on"):
        scaled(found, 5e-324)
    for count in (0, 4, -1, True):
        with pytest.raises(InvalidRequest, match=f"count is {count}; allowed is 1 to 3"):
            head(found, count)
        with pytest.raises(InvalidRequest, match=f"replicas is {count}; allowed is 1 to 3"):
            split(found, count)


@pytest.mark.parametrize(
    ("arrivals", "message"),
    [
        ((), "the trace t has 0 requests; allowed are 1 to"),
        ((Arrival(1.0, 1, 1), Arrival(0.5, 1, 1)), "request 1 of the trace t arrives at 0.5 s, after one at 1.0 s"),
        ((Arrival(-1.0, 1, 1),), "request 0 of the trace t arrives at -1.0 s; allowed are finite numbers from 0 on"),
        ((Arrival(math.nan, 1, 1),), "arrives at nan s"),
        ((Arrival(0.0, 1, 1), Arrival(math.inf, 1, 1)), "request 1 of the trace t arrives at inf s"),
        ((Arrival(0.0, 0, 1),), f"prompt whose length is 0; allowed are whole numbers from 1 to {MAX_TOKENS}"),
        ((Arrival(0.0, 5.0, 1),), "prompt whose length is 5.0"),  # type: ignore[arg-type]
        ((Arrival(0.0, 1, 0),), "output whose length is 0"),
        ((Arrival(0.0, 1025, 1, (1,)),), "blocks that are 1; allowed are 2 or 3 for 1025 tokens"),
        ((Arrival(0.0, 1, 1, (-1,)),), "blocks that have -1"),
        ((Arrival(0.0, 1, 1, (), None, 1.0),), "request 0 of the trace t has the gap 1.0 and shares 0 tokens"),
        ((Arrival(0.0, 1, 1, (), 0),), "comes after 0; allowed are indices of earlier requests"),
        ((Arrival(0.0, 5, 5), Arrival(0.0, 9, 1, (), 0, math.inf)), "has the gap inf; allowed are finite seconds"),
        (
            (Arrival(0.0, 5, 5), Arrival(0.0, 99, 1, (), 0, 1.0, 11)),
            "shares 11 tokens with request 0; allowed are 0 to 10",
        ),
        ((Arrival(0.0, 5, 5), Arrival(0.0, 9, 1, (), 0, 1.0, 9)), "shares 9 tokens with request 0; allowed are 0 to 8"),
    ],
)
def test_a_trace_names_what_is_wrong(arrivals: tuple[Arrival, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Trace("t", arrivals)


# Tokens


@given(st.integers(1, 4 * BLOCK), st.integers(1, 4 * BLOCK), st.integers(0, 4), st.integers(0, 9), st.integers(10, 99))
@settings(max_examples=80)
def test_tokens_are_equal_as_far_as_blocks_are(one: int, two: int, shared: int, salt: int, other: int) -> None:
    prompts = []
    for number, length in ((salt, one), (other, two)):
        names = tuple(range(shared)) + tuple(1000 * number + n for n in range(9))
        prompts.append(tokens(Arrival(0.0, length, 1, names[: blocks_of(length)]), number))
    assert [len(prompt) for prompt in prompts] == [one, two]
    both = min(one, two)
    equal = next((n for n in range(both) if prompts[0][n] != prompts[1][n]), both)
    assert equal == min(both, shared * BLOCK)


def test_tokens_of_no_block_are_the_requests_own() -> None:
    assert tokens(Arrival(0.0, 3, 1), 0) != tokens(Arrival(0.0, 3, 1), 1)
    partly = tokens(Arrival(0.0, BLOCK + 3, 1, (7,)), 5)
    assert partly == (14,) * BLOCK + (11,) * 3
    assert len({id(token) for token in tokens(Arrival(0.0, 4 * BLOCK, 1, (10**9,) * 4), 0)}) <= 4  # few ints, shared


# Files


def test_azure_times_keep_all_digits(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    rows = (HEADER, ROW, "2023-11-16 18:15:46.6805901,1,2", "2023-11-17 00:00:00,3,4", "")
    path.write_bytes("\r\n".join(rows).encode())
    found = read(path)
    assert found.name == "a"
    assert [(a.prompt, a.output) for a in found.arrivals] == [(374, 44), (1, 2), (3, 4)]
    assert [a.at for a in found.arrivals] == [0.0, 1e-7, 20653.31941]


def test_the_format_is_told_by_content(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.csv"
    later = {**GOOD, "timestamp": 4500.5, "hash_ids": [0, 2], "more": None}
    path.write_text(f"\ufeff{json.dumps({**GOOD, 'timestamp': 1000})}\n\n{json.dumps(later)}", "utf-8")
    arrivals = (Arrival(0.0, 600, 5, (0, 1)), Arrival(3.5005, 600, 5, (0, 2)))
    assert trace(path) == trace(str(path)) == Trace("mooncake", arrivals)
    assert read(path, "mine") == Trace("mine", arrivals)


def _mooncake(**change: object) -> str:
    return json.dumps({**GOOD, **change})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 is ''; allowed is a CSV file that begins with TIMESTAMP"),
        ("hello\n", "line 1 is 'hello'"),
        (HEADER, "has 0 requests"),
        (f"{HEADER}\n{ROW}\n2023-11-16 18:15:46,1,1", "line 3 has an earlier time than the one before"),
        (f"{HEADER}\n{ROW},5", "line 2 has 4 fields"),
        (f"{HEADER}\n{ROW.replace('374', '-5')}", "line 2 has a ContextTokens that is '-5'; allowed are whole numbers"),
        (f"{HEADER}\n{ROW.replace('374', '0')}", "line 2 has a ContextTokens that is 0"),
        (f"{HEADER}\n{ROW.replace('374', 'many')}", "ContextTokens that is 'many'"),
        (f"{HEADER}\n{ROW.replace('374', '٣')}", "ContextTokens that is"),
        (f"{HEADER}\n{ROW.replace('374', '9' * 5000)}", "ContextTokens that is '9999"),
        (f"{HEADER}\n\n{ROW.replace('2023', '23')}", "line 3 has the TIMESTAMP '23-11-16"),
        (f"{HEADER}\n{ROW.replace('11-16', '02-30')}", "TIMESTAMP '2023-02-30 18:15:46.6805900'"),
        ('{"timestamp": 0, "input_le', "line 1 is not JSON"),
        (_mooncake() + "\n[1]", r"line 2 is '\[1\]'; allowed is an object"),
        ("{" + '"a":{' * 60_000, "line 1 is not JSON"),
        (_mooncake() + "\n" + json.dumps({"timestamp": 1}), "line 2 has no input_length"),
        (_mooncake(timestamp=5) + "\n" + _mooncake(timestamp=4), "line 2 has an earlier time"),
        (_mooncake(timestamp=-1), "the timestamp -1; allowed are milliseconds"),
        (_mooncake(timestamp=math.nan), "the timestamp nan"),
        (_mooncake(timestamp=True), "the timestamp True"),
        (_mooncake(timestamp=10**30), "the timestamp 10000"),
        (_mooncake().replace("600", "9" * 5000), "line 1 is not JSON"),
        (_mooncake(input_length=0), "an input_length that is 0"),
        (_mooncake(output_length=2**24 + 1), "an output_length that is 16777217"),
        (_mooncake(hash_ids="01"), "hash_ids that are '01'; allowed is a list"),
        (_mooncake(hash_ids=[0, 1, 2]), "hash_ids that are 3"),
        (_mooncake(input_length=10_000), "hash_ids that are 2; allowed are 19 or 20 for 10000 tokens"),
        (_mooncake(hash_ids=[0, "1"]), "hash_ids that have '1'"),
        (_mooncake(hash_ids=[False, 1]), "hash_ids that have False"),
        (_mooncake(hash_ids=[0, 2**62]), "hash_ids that have 4611686018427387904"),
    ],
)
def test_bad_files_name_the_line_and_the_value(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content, "utf-8")
    with pytest.raises(InvalidRequest, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_what_is_no_text_or_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(f"{HEADER}\n".encode() + b"2023\xff")
    with pytest.raises(InvalidRequest, match="line 2 is not UTF-8: byte 0xff at position 4"):
        read(path)
    path.write_bytes(f"{HEADER}\n{ROW}\n{ROW}".encode())
    for name, value, message in (
        ("MAX_BYTES", 80, "it has 109 bytes; allowed are 80"),
        ("MAX_LINE", 39, "line 1 is too long"),
        ("MAX_REQUESTS", 1, "line 3 is one request more than allowed"),
    ):
        with monkeypatch.context() as limited:
            limited.setattr(trace_files, name, value)
            with pytest.raises(InvalidRequest, match=message):
                read(path)
    for wrong, message in ((tmp_path, "it is no file"), (tmp_path / "none", "no such file"), ("a\0b", "no such file")):
        with pytest.raises(InvalidRequest, match=message):
            read(wrong)


@given(st.text(max_size=200), st.sampled_from(["", f"{HEADER}\n", f"{HEADER}\n{ROW}\n", _mooncake() + "\n", "{"]))
@settings(max_examples=150)
def test_any_text_is_a_trace_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str, before: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.txt"
    path.write_bytes((before + text).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(InvalidRequest):
        assert read(path).arrivals


def test_compressed_files_are_read_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv.gz"
    packed = gzip.compress(f"{HEADER}\n{ROW}\n{ROW}".encode())
    path.write_bytes(packed)
    assert (read(path).name, len(read(path).arrivals)) == ("t", 2)
    for damaged in (packed[:-12], packed[:20] + b"\0\0\0" + packed[23:], packed[:4]):
        path.write_bytes(damaged)
        with pytest.raises(InvalidRequest, match=r"t\.csv\.gz cannot be read: "):
            read(path)
    path.write_bytes(gzip.compress(f"{HEADER}\n".encode() + f"{ROW}\n".encode() * 10_000))
    monkeypatch.setattr(trace_files, "MAX_BYTES", 100_000)
    with pytest.raises(InvalidRequest, match="allowed are 1048576 bytes, and 100000 in all"):
        read(path)


def test_an_unknown_trace_lists_the_known_ones(tmp_path: Path) -> None:
    for name in ("azure", "", "a\0b", str(tmp_path), tmp_path / "none.csv"):
        with pytest.raises(InvalidRequest, match="conversation, coding-agents, or a CSV"):
            trace(name)


def test_a_damaged_file_is_not_replaced_by_a_drawn_one(tmp_path: Path) -> None:
    (tmp_path / "azure_code_2023.csv").write_text("spoilt")
    with pytest.raises(InvalidRequest, match="line 1 is 'spoilt'"):
        trace("azure-code", folder=tmp_path)


# Excerpts


@settings(max_examples=30)
@given(st.integers(20, 400), st.integers(1, 400), st.integers(0, 5))
def test_an_excerpt_has_so_many_requests_in_their_order(total: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = Trace("t", tuple(Arrival(float(n), int(rng.integers(1, 999)), n + 1) for n in range(total)))
    part = windows(found, count)
    length = max(1, count // WINDOWS)
    assert len(part.arrivals) == (total if total <= count else count // length * length)
    outputs = [arrival.output for arrival in part.arrivals]
    assert outputs == sorted(set(outputs))


def test_an_excerpt_is_like_the_whole() -> None:
    """Mean lengths and context of 2,000 of Azure's requests are within 3 % of the whole's."""
    for name in ("azure-conv", "azure-code"):
        whole = trace(name)
        part = windows(whole, 2000)
        for measured in (lambda a: a.prompt, lambda a: a.output, lambda a: a.output * (a.prompt + a.output / 2)):
            means = [np.mean([measured(arrival) for arrival in each.arrivals]) for each in (part, whole)]
            assert means[0] == pytest.approx(means[1], rel=0.03)
