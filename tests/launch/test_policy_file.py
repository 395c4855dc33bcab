"""Policy files: they come back as they were written, and nothing that is wrong in one gets past."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from engine_rig import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lamina.cli.policy import policy_app
from lamina.errors import InvalidRequest, PolicyError
from lamina.policy_file import PolicyFile, dumps, import_duo, kept, kept_share, read, read_alphas, write
from lamina.system.text_files import MAX_BYTES
from lamina_workers.model_config.config import ModelConfig

GOOD = 'version = 1\nmodel = "tiny"\nfingerprint = ""\n[[layer]]\nheads = ["full", "streaming"]\n'
DATA = Path(os.environ.get("LAMINA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "attn_patterns"

_policies = st.one_of(
    st.just("full"),
    st.builds("streaming(sink={}, recent={})".format, st.integers(0, 9999), st.integers(1, 9999)),
    st.builds("span(alpha={}, beta={})".format, st.integers(1, 9999), st.floats(0, 1)),
    st.builds("sharded(block=64, stride=8, offset={}, step={})".format, st.integers(0, 63), st.integers(0, 9)),
)
_remarks = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
)
_files = st.builds(
    PolicyFile,
    model=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    fingerprint=st.sampled_from(["", "0123456789abcdef" * 2]),
    heads=st.integers(1, 5).flatmap(
        lambda heads: st.lists(st.tuples(*[_policies] * heads), min_size=1, max_size=6).map(tuple)
    ),
    about=st.dictionaries(st.from_regex(r"\A[A-Za-z0-9_-]{1,20}\Z"), _remarks, max_size=4),
)


@given(_files)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path: Path, file: PolicyFile) -> None:
    write(tmp_path / "policy.toml", file)
    assert read(tmp_path / "policy.toml") == file
    assert os.listdir(tmp_path) == ["policy.toml"]


def test_a_person_can_write_it(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("\ufeff# mine\r\n" + GOOD.replace('"streaming"', '" streaming( recent = 9 ) "'))
    assert read(tmp_path / "p.toml").heads == (("full", "streaming(sink=64, recent=9)"),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"version is None; allowed is 1"),
        (GOOD.replace("= 1", "= true"), r"version is True; allowed is 1"),
        (GOOD + "sink = 3\n", r"layer 0 has the key 'sink'; allowed are heads"),
        ("colour = 3\n" + GOOD, r"the file has the key 'colour'; allowed are version, model"),
        (
            GOOD.replace('"streaming"', '"steaming"'),
            r"layer 0, head 1: there is no policy 'steaming'; allowed are full",
        ),
        (GOOD.replace('"streaming"', '"streaming(recent=0)"'), r"head 1: streaming: recent is 0; allowed is 1 to"),
        (GOOD.replace('"streaming"', "3"), r"head 1: the policy is 3; allowed is a text"),
        (GOOD.replace('["full", "streaming"]', "[]"), r"heads of layer 0 is \[\]; allowed are 1 to"),
        ("version = 1\n", r"there are 0 layers; allowed are 1 to"),
        ('version = 1\nlayer = "x"\n', r"layer is 'x'; allowed are tables"),
        ("version = 1\nlayer = [1]\n", r"layer is \[1\]; allowed are tables"),
        (GOOD.replace('""', '"xyz"'), r"fingerprint is 'xyz'; allowed are hexadecimal digits"),
        (GOOD.replace('"tiny"', "7"), r"model is 7; allowed is a text"),
        (GOOD + "[about]\nwhen = 2024-01-01\n", r"about.when is datetime.date.*allowed are texts"),
        (GOOD + "[about]\nlarge = 9223372036854775808\n", r"about.large is 9223372036854775808; allowed"),
        (GOOD + '[about]\n"a b" = 1\n', r"about has the key 'a b'; allowed are"),
        ("about = 3\n" + GOOD, r"about is 3; allowed is a table"),
        (GOOD.replace("]]", "]"), r"is not TOML"),
        ("x = " + "[" * 5000, r"is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(content)
    with pytest.raises(PolicyError, match=said) as caught:
        read(file)
    assert str(file) in str(caught.value)


@given(
    st.one_of(
        st.binary(max_size=300), st.text(alphabet='[]{}="#\n layer.heads1versionfull', max_size=200).map(str.encode)
    )
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_policy_or_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "any.toml"
    file.write_bytes(content)
    with pytest.raises(PolicyError):  # no such text happens to be whole
        read(file)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_a_policy_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "damaged.toml"
    file.write_bytes(content)
    try:
        found = read(file)
    except PolicyError as error:
        said = str(error)
    else:
        said = str(file)
        assert read_again(tmp_path, found) == found
    assert str(file) in said


def read_again(folder: Path, file: PolicyFile) -> PolicyFile:
    write(folder / "again.toml", file)
    return read(folder / "again.toml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "large.toml").write_text("#" * (MAX_BYTES + 1))
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"')
    for name, said in (
        ("none.toml", "no such file"),
        (".", "it is no file"),
        ("large.toml", f"more than {MAX_BYTES} bytes"),
        ("latin.toml", "not UTF-8: byte 0xe9 at position 9"),
    ):
        with pytest.raises(PolicyError, match=said):
            read(tmp_path / name)
    with pytest.raises(PolicyError):
        read("nul\0.toml")


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    write(file, PolicyFile("a", "", (("full",),)))
    before = file.read_text()
    with pytest.raises(PolicyError, match="cannot be written"):
        write(file, PolicyFile("\ud800", "", (("full",),)))  # no UTF-8 for this
    assert file.read_text() == before
    assert os.listdir(tmp_path) == ["p.toml"]
    with pytest.raises(PolicyError, match="cannot be written"):
        write(tmp_path / "no" / "p.toml", PolicyFile("a", "", (("full",),)))


def test_it_fits_its_model_alone() -> None:
    model = ModelConfig.from_dict(TINY)  # 3 layers, 3 KV heads
    heads = (("full",) * 3,) * 3
    PolicyFile("tiny", "", heads).check(model, "ab")
    PolicyFile("tiny", "ab", heads).check(model, "ab")
    with pytest.raises(PolicyError, match=r"fingerprint cd; the model has ab\. Allowed"):
        PolicyFile("tiny", "cd", heads).check(model, "ab")
    with pytest.raises(PolicyError, match="this policy has 2 layers; the model has 3"):
        PolicyFile("tiny", "", heads[:2]).check(model, "ab")
    with pytest.raises(PolicyError, match="layer 1 of this policy has 2 heads; the model has 3"):
        PolicyFile("tiny", "", (heads[0], ("full",) * 2, heads[2])).check(model, "ab")
    assert PolicyFile("tiny", "", heads).policies(3, 3) == heads


@pytest.mark.parametrize(
    ("policy", "length", "tokens"),
    [
        ("full", 1000, 1000),
        ("streaming(sink=64, recent=256)", 8192, 319),  # the next query sees itself and 255 before it
        ("streaming(sink=64, recent=256)", 100, 100),
        ("streaming(sink=0, recent=1)", 50, 0),
        ("sharded", 5000, 5000),  # reads less, and keeps all
    ],
)
def test_what_is_kept(policy: str, length: int, tokens: int) -> None:
    assert kept(policy, length) == tokens


def test_shares_are_means_over_heads() -> None:
    assert kept_share((("full", "streaming(sink=64, recent=192)"), ("full", "full")), 1000) == pytest.approx(0.81375)


class TestPublishedPatterns:
    """Published files have the form of these made-up ones: tabs, exponents, values a little outside [0, 1]."""

    ROWS = ("9.0e-01\t-2.0e-04\t5.0e-01\t5.0e-01", "5.0e-01\t1.001e+00\t0.0\t5.0e-01")

    def tsv(self, folder: Path, *rows: str) -> Path:
        file = folder / "full_attention_heads.tsv"
        file.write_text("\n".join(rows) + "\n")
        return file

    def test_alphas_are_clamped(self, tmp_path: Path) -> None:
        assert read_alphas(self.tsv(tmp_path, *self.ROWS)) == ((0.9, 0, 0.5, 0.5), (0.5, 1, 0, 0.5))

    @pytest.mark.parametrize("sparsity", [0, 0.125, 0.25, 0.5, 0.6, 0.75, 1])
    def test_the_share_is_exact_whatever_ties(self, tmp_path: Path, sparsity: float) -> None:
        heads = [p for layer in import_duo(self.tsv(tmp_path, *self.ROWS), sparsity).heads for p in layer]
        assert sum(policy != "full" for policy in heads) == round(8 * sparsity)

    def test_the_least_needed_stream(self, tmp_path: Path) -> None:
        streaming = "streaming(sink=64, recent=256)"
        file = import_duo(self.tsv(tmp_path, *self.ROWS), 0.25)
        assert file.heads == (("full", streaming, "full", "full"), ("full", "full", streaming, "full"))
        assert file.fingerprint == ""

    @pytest.mark.parametrize(
        ("config", "policy"),
        [
            ({"sink_size": 128, "recent_size": 256, "deploy_sink_size": None}, "streaming(sink=128, recent=256)"),
            ({"sink_size": 128, "deploy_sink_size": 32, "deploy_recent_size": 99}, "streaming(sink=32, recent=99)"),
            ({}, "streaming(sink=64, recent=256)"),
        ],
    )
    def test_sizes_come_from_beside_it(self, tmp_path: Path, config: dict[str, object], policy: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        file = self.tsv(tmp_path, *self.ROWS)
        assert import_duo(file, 1).heads[0][0] == policy
        assert import_duo(file, 1, sink=7, recent=8).heads[0][0] == "streaming(sink=7, recent=8)"

    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            (("0.5\t0.5", "0.5"), r"row 2 has 1 numbers; allowed are 2"),
            (("0.5\tnan",), r"row 1 has 'nan'; allowed are numbers from -1 to 2"),
            (("0.5", "full"), r"row 2 has 'full'; allowed"),
            (("", " "), r"it has 0 rows"),
            (("0\t" * 5000,), r"1 rows of 5000 numbers; allowed are"),
            (("0",) * 2000, r"2000 rows of 1 numbers; allowed are"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, rows: tuple[str, ...], said: str) -> None:
        file = self.tsv(tmp_path, *rows)
        with pytest.raises(PolicyError, match=said) as caught:
            import_duo(file, 0.5)
        assert str(file) in str(caught.value)

    @pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan])
    def test_sparsity_is_a_share(self, tmp_path: Path, sparsity: float) -> None:
        with pytest.raises(PolicyError, match=r"sparsity is .*; allowed is 0 to 1"):
            import_duo(self.tsv(tmp_path, *self.ROWS), sparsity)

    @pytest.mark.parametrize(
        ("content", "said"), [("{", "not JSON"), ("[]", "holds a list"), ('{"sink_size": "x"}', "sink_size is 'x'")]
    )
    def test_a_config_that_is_wrong(self, tmp_path: Path, content: str, said: str) -> None:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(PolicyError, match=said):
            import_duo(self.tsv(tmp_path, *self.ROWS), 0.5)

    @pytest.mark.skipif(not DATA.is_dir(), reason=f"no published patterns at {DATA}")
    @pytest.mark.parametrize(
        ("model", "layers", "heads"),
        [
            ("Llama-2-7B-32K-Instruct", 32, 32),
            ("Meta-Llama-3.1-8B-Instruct", 32, 8),
            ("Mistral-7B-Instruct-v0.3", 32, 8),
        ],
    )
    def test_published_ones(self, tmp_path: Path, model: str, layers: int, heads: int) -> None:
        file = import_duo(DATA / model / "full_attention_heads.tsv", 0.5)
        assert [len(layer) for layer in file.heads] == [heads] * layers
        assert sum(policy == "full" for layer in file.heads for policy in layer) == layers * heads // 2
        assert read_again(tmp_path, file) == file
        assert kept_share(file.heads, 32768) == pytest.approx(0.5 + 0.5 * 383 / 32768)  # sink 128, recent 256


class TestCommands:
    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(policy_app, list(arguments))
        if result.exception is not None:
            raise result.exception
        return result.stdout

    def test_import_then_show(self, tmp_path: Path) -> None:
        tsv = TestPublishedPatterns().tsv(tmp_path, *TestPublishedPatterns.ROWS)
        out = str(tmp_path / "policy.toml")
        assert "6 of 8 KV heads are full" in self.run("import", str(tsv), "--sparsity", "0.25", "--out", out)
        assert "KV kept at 3190 tokens: 77.5%" in self.run("show", out, "--context", "3190")
        said = json.loads(self.run("show", out, "--json"))
        assert said["heads"] == [list(layer) for layer in read(out).heads]

    def test_bad_words_are_refused(self, tmp_path: Path) -> None:
        tsv = TestPublishedPatterns().tsv(tmp_path, *TestPublishedPatterns.ROWS)
        with pytest.raises(InvalidRequest, match=r"end in \.toml"):
            self.run("import", str(tsv), "--out", str(tmp_path / "policy.txt"))
        (tmp_path / "policy.toml").write_text(dumps(PolicyFile("a", "", (("full",),))))
        with pytest.raises(InvalidRequest, match="context is 0; allowed are 1"):
            self.run("show", str(tmp_path / "policy.toml"), "--context", "0")
