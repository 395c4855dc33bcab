"""`lamina plan`, `lamina simulate` and `--plan`: words in, tables and files out, every wrong value named."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lamina.cli.main import app
from lamina.cli.simulate import parse_policy, parse_rate, parse_slo
from lamina.errors import InvalidRequest
from lamina.measure.bench import plan_check
from lamina.measure.bench.plan_check import Check, Figure, Noise
from lamina.simulator.costs.cost_model import KvPolicy
from lamina.simulator.costs.hardware import ROOFLINE, load, with_efficiency
from lamina.simulator.costs.model_configs import model
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning import plan_file
from lamina.simulator.planning.comparison import Choice, build
from lamina.simulator.traces.arrivals import Trace

INVENTORY = """
links = ["fhbn-400g"]
systems = ["chunked", "lamina"]
[[have]]
device = "h100"
count = 4
[[have]]
device = "h20"
count = 1
"""
"""Few candidates: what is said and written is the same for many."""
FEW = ["--count", "60", "--seed", "1"]


def lamina(*words: str, obj: Any = None) -> Any:
    return CliRunner().invoke(app, list(words), obj=obj)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One whole run, and the folder that it wrote into."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "inventory.toml").write_text(INVENTORY, encoding="utf-8")
    files = ["--out", str(folder / "plan.toml"), "--html", str(folder / "report.html")]
    words = ["plan", "--why", "--budget", "50", "--inventory", str(folder / "inventory.toml"), *FEW, *files]
    return lamina(*words), folder


class Planned:
    """Stands for `LLM`: keeps how it was opened."""

    def __init__(self) -> None:
        self.opened: list[tuple[Any, ...]] = []

    def from_plan(self, path: Path, *, model: str | None, **options: Any) -> Planned:
        options.pop("progress")
        self.opened.append((path.name, model, options))
        raise InvalidRequest("enough")

    def __call__(self, model: str, **options: Any) -> Planned:
        self.opened.append((model, options))
        raise InvalidRequest("enough")


def test_a_plan_is_printed_explained_and_written(planned: tuple[Any, Path]) -> None:
    result, folder = planned
    assert result.exit_code == 0, result.output
    for words in (
        "DOP(a, b): ",
        "Not considered: ",
        "candidates, of which",
        "Take ",
        "What would change it\n",
        "price of h100, now 11.1 $/h",
        "h100 $11.06 (2024), h20 $4.63 (2024, assumed)",
        "Assumed\n",
    ):
        assert words in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines() if str(folder) not in line)
    assert "ranking: " in result.stderr  # without a terminal, too
    counted = re.search(r"[\d,]+ candidates, of which [\d,]+ serve the whole load", result.stdout)
    assert counted is not None
    assert counted[0] in (folder / "report.html").read_text(encoding="utf-8")
    assert "Offloading attention does not pay here" in result.stdout or "best without offloading" in result.stdout
    plan = plan_file.read(folder / "plan.toml")
    assert plan.model == "llama-3-70b"
    assert plan.slo == Slo(ttft=2.0, tpot=0.1)
    assert plan.predicted.dollars_per_hour <= 50
    assert plan.predicted.source == "event loop"
    assert plan.system.max_sequences < 4096  # no more than the plan counts on
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "what would change it" in page
    assert "<script" not in page


def test_a_plan_as_json(planned: tuple[Any, Path]) -> None:
    inventory = str(planned[1] / "inventory.toml")
    found = json.loads(lamina("plan", "--inventory", inventory, "--no-verify", "--json", "--rate", "max", *FEW).stdout)
    assert found["candidates"] >= len(found["ranking"]) > 1
    first = found["ranking"][0]
    assert first["serves"]
    assert first["demanded"] is None
    assert 0 < first["dollars_per_million"] < 100
    scores = [each["requests_per_dollar"] for each in found["ranking"]]
    assert scores == sorted(scores, reverse=True)
    assert all(isinstance(each, str) for each in found["answer"])
    assert found["sensitivity"] == []  # asked for by --why


def test_the_plan_is_opened_with_what_was_written_besides(planned: tuple[Any, Path]) -> None:
    file = str(planned[1] / "plan.toml")
    llm = Planned()
    lamina("generate", "x", "--plan", file, obj=llm)
    lamina("generate", "x", "--plan", file, "-m", "smollm2-135m", "--lanes", "1", "--dtype", "auto", obj=llm)
    lamina("chat", "--plan", file, "--threads", "2", obj=llm)
    lamina("generate", "x", obj=llm)
    assert [opened[:2] for opened in llm.opened[:3]] == [
        ("plan.toml", None),
        ("plan.toml", "smollm2-135m"),
        ("plan.toml", None),
    ]
    assert [opened[2] for opened in llm.opened[:3]] == [{}, {"lanes": 1, "dtype": "auto"}, {"threads": 2}]
    assert llm.opened[3][0] == "smollm2-135m"
    assert "no.toml: there is no such file" in lamina("generate", "x", "--plan", "no.toml").stderr


def test_systems_are_compared_and_everything_is_written(tmp_path: Path) -> None:
    words = ["simulate", "--system", "chunked,lamina", *FEW]
    result = lamina(*words, "--out", str(tmp_path / "runs"))
    assert result.exit_code == 0, result.output
    assert "4x h100 co-located" in result.stdout
    assert "DOP(2, 4) h100 + h20, 2 lanes" in result.stdout
    assert {file.name for file in (tmp_path / "runs").iterdir()} == {
        "results.txt", "results.json", "results.csv", "report.html",
    }  # fmt: skip
    printed = lamina(*words, "--json").stdout
    assert printed == (tmp_path / "runs" / "results.json").read_text(encoding="utf-8")
    as_json = json.loads(printed)["results"]
    assert [run["finished"] for run in as_json] == [60, 60]
    assert as_json[0]["assumptions"]["memory"].startswith("90 %")
    rows = list(csv.DictReader(io.StringIO(lamina("simulate", "--system", "chunked", *FEW, "--csv").stdout)))
    assert [float(row["tokens_per_second"]) for row in rows] == [as_json[0]["tokens_per_second"]]


def test_overload_is_said_and_how_many_would_do(tmp_path: Path) -> None:
    words = ["simulate", "--system", "chunked", "--rate", "40", "--count", "200", "--seed", "1"]
    words += ["--out", str(tmp_path / "runs")]
    lines = lamina(*words).stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert "SLO tpot=100ms,ttft=2s; efficiency typical" in " ".join(" ".join(lines[:2]).split())
    said = " ".join(" ".join(lines).split())
    found = re.search(
        r"4x h100 co-located: [\d.]+% within the SLO at 40 requests/s.* By formula (\d+) replicas would", said
    )
    assert found is not None
    assert 2 < int(found[1]) < 40
    for file in ("results.txt", "report.html"):
        text = (tmp_path / "runs" / file).read_text(encoding="utf-8")
        assert f"By formula {found[1]} replicas would keep the SLO" in " ".join(text.split())


def test_packed_weights_and_drafts_are_faster_and_said() -> None:
    def run(*words: str) -> dict[str, Any]:
        words = ("simulate", "--system", "chunked", "-m", "llama-3-8b", "--json", *FEW, *words)
        found: dict[str, Any] = json.loads(lamina(*words).stdout)["results"][0]
        return found

    drafted = ("--speculate", "ngram", "--acceptance", "0.6", "--proposed", "0.5")
    plain, packed, both = run(), run("--weights", "q4_k"), run("--weights", "q4_k", *drafted)
    assert plain["tpot"]["mean"] > packed["tpot"]["mean"] > both["tpot"]["mean"]
    assert plain["kv_tokens"] < packed["kv_tokens"] == both["kv_tokens"]
    assert both["assumptions"]["weights"].startswith("q4_k, 0.578125 bytes each")
    assert both["assumptions"]["speculation"].startswith("up to 8 drafts by ngram in 50% of the steps")
    assert "weights" not in plain["assumptions"]


def test_a_plan_on_free_hosts_is_packed_speculates_and_is_drawn(tmp_path: Path) -> None:
    free = 'systems = ["chunked"]\n[[have]]\ndevice = "epyc-genoa"\ncount = 1\nprice = 0\n'
    (tmp_path / "hosts.toml").write_text(free)
    words = ["plan", "-m", "llama-3.2-1b", "--inventory", str(tmp_path / "hosts.toml"), *FEW]
    words += ["--weights", "int4", "--speculate", "llama-3.2-1b", "--acceptance", "0.8"]
    words += ["--num-speculative-tokens", "3", "--out", str(tmp_path / "plan.toml")]
    result = lamina(*words, "--html", str(tmp_path / "x.html"))
    assert result.exit_code == 0, result.output
    assert "output tokens a second, within the SLO" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "To deploy it" in result.stdout
    assert "  Weights: int4, 0.5625 bytes each" in result.stdout
    assert "  Speculation: up to 3 drafts by llama-3.2-1b in 100% of the steps" in result.stdout
    engine = plan_file.read(tmp_path / "plan.toml").engine
    assert {name: engine[name] for name in ("quantize", "speculate", "num_speculative_tokens")} == {
        "quantize": "int4", "speculate": "llama-3.2-1b", "num_speculative_tokens": 3,
    }  # fmt: skip


def test_of_one_candidate_nothing_is_said_about_others(tmp_path: Path) -> None:
    (tmp_path / "host.toml").write_text('systems = ["colocated"]\n[[have]]\ndevice = "epyc-genoa"\ncount = 1\n')
    words = ["plan", "-m", "llama-3.2-1b", "--inventory", str(tmp_path / "host.toml"), "--slo", "none", *FEW]
    result = lamina(*words, "--html", str(tmp_path / "x.html"))
    assert result.exit_code == 0, result.output
    assert "1x epyc-genoa co-located" in result.stdout
    for said in (result.stdout, (tmp_path / "x.html").read_text(encoding="utf-8")):
        assert "andidates" not in said
        assert "ffloading attention" not in said
    assert "heaper" not in result.stdout


def test_a_plan_that_serves_a_part_is_not_deployed_and_ends_with_1(planned: tuple[Any, Path], tmp_path: Path) -> None:
    words = ["plan", "--inventory", str(planned[1] / "inventory.toml"), "--rate", "500", *FEW]
    result = lamina(*words, "--out", str(tmp_path / "plan.toml"))
    assert result.exit_code == 1, result.output
    assert "No system here serves all 500 requests/s" in result.stdout
    assert "it does not serve all that is asked for" in " ".join(result.stdout.split())
    assert "To deploy it" not in result.stdout
    assert plan_file.read(tmp_path / "plan.toml").predicted.requests_per_second < 500


def test_the_roofline_and_prompts_elsewhere_are_faster() -> None:
    def tokens(*words: str) -> float:
        found = json.loads(lamina("simulate", "--system", "lamina", "--json", "--rate", "max", *FEW, *words).stdout)
        rate: float = found["results"][0]["tokens_per_second"]
        return rate

    assert tokens() < tokens("--efficiency", "roofline") < tokens("--efficiency", "roofline", "--no-prefill")


def test_a_check_prints_promised_beside_measured(planned: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = (Figure("TTFT p50", "ms", 200.0, 170.0, 236.0, 160.0), Figure("in time", "%", 98.0, 93.1, 100.0, 96.5))
    noise = Noise(0.2, 40e9, 30e9, 40e9)
    made = Check("azure-conv at 1/s", 120, 121.5, figures, noise, {"timeout": 2}, ("client: well",))
    asked: list[Any] = []

    def check(path: Path, trace: Trace, *, minutes: float, progress: Any) -> Check:
        asked.append((path.name, trace.name, minutes))
        return made

    monkeypatch.setattr(plan_check, "check", check)
    file = str(planned[1] / "plan.toml")
    result = lamina("plan", "--check", file, "--minutes", "2.5", *FEW)
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["", "TTFT p50, ms", "in time, %"]
    assert lines[3].split()[3:] == ["200.0", "170.0", "to", "236.0", "160.0", "+25.0%", "no"]
    assert lines[4].split()[3:] == ["98.0", "93.1", "to", "100.0", "96.5", "+1.5", "points", "yes"]
    assert "beware: busy: other processes used 20% of the cores during the run" in lines
    assert "failed: 2 x timeout" in lines
    assert max(map(len, lines)) <= 100
    assert asked == [("plan.toml", "azure-conv", 2.5)]
    found = json.loads(lamina("plan", "--check", file, "--json", *FEW).stdout)
    assert [each["measured"] for each in found["figures"]] == [160.0, 96.5]
    assert len(found["remarks"]) == 2


@pytest.mark.parametrize(
    ("named", "served"), [("coding-agents", "coding-agents (synthetic)"), ("mine.csv", "azure-code")]
)
def test_a_check_serves_the_planned_trace_and_says_where_it_cannot(
    planned: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, served: str
) -> None:
    asked: list[str] = []

    def check(path: Path, trace: Trace, *, minutes: float, progress: Any) -> Check:
        assert all(arrival.after is None for arrival in trace.arrivals)
        asked.append(trace.name)
        return Check(trace.name, 1, 1.0, (), Noise(0.0, 1e9, 1e9, 1e9), {}, ())

    monkeypatch.setattr(plan_check, "check", check)
    file = tmp_path / "plan.toml"
    text = (planned[1] / "plan.toml").read_text(encoding="utf-8")
    file.write_text(text.replace('name = "azure-conv"', f'name = "{named}"'), encoding="utf-8")
    result = lamina("plan", "--check", str(file), "--trace", "azure-code", "--count", "30")
    assert asked == [served]
    said = f"its trace, {named}, is not a published one; --trace {served} is served instead"
    assert (said in result.stderr) == (named == "mine.csv")


def test_a_slo_is_read_strictly() -> None:
    assert parse_slo("tpot=100ms,ttft=2s") == Slo(ttft=2.0, tpot=0.1)
    assert parse_slo(" ttft=1.5s ") == Slo(ttft=1.5)
    assert parse_slo("tpot=500us") == Slo(tpot=5e-4)
    assert parse_slo("none") == Slo()
    for wrong in (
        "",
        "tpot",
        "tpot=1",
        "tpot=-1ms",
        "tpot=0ms",
        "tpot=1ms,tpot=2ms",
        "tbt=1ms",
        "tpot=1 ms",
        "tpot=nans",
    ):
        with pytest.raises(InvalidRequest, match="slo is"):
            parse_slo(wrong)


def test_rates_and_policies_are_read_strictly() -> None:
    assert (parse_rate("trace"), parse_rate("max"), parse_rate("2.5")) == (None, math.inf, 2.5)
    for wrong in ("0", "-1", "nan", "inf", "1e9", ""):
        with pytest.raises(InvalidRequest, match="rate is"):
            parse_rate(wrong)
    assert parse_policy("streaming(sink=64, recent=256)=0.3,0.4") == KvPolicy(
        "streaming(sink=64, recent=256)", 0.3, 0.4
    )
    for wrong in ("0.3,0.4", "=0.3,0.4", "auto", "auto=0.3", "auto=a,b"):
        with pytest.raises(InvalidRequest, match="allowed is NAME=READ,HELD"):
            parse_policy(wrong)


def test_systems_have_the_papers_sizes_unless_devices_are_named() -> None:
    known = load()
    for name, a, b, whole in (("llama-33b", 1, 2, 2), ("llama-65b", 2, 4, 4), ("llama-3-70b", 2, 4, 4)):
        choice = Choice(model(name), known)
        lamina, vllm = build("lamina", choice), build("chunked", choice)  # table 5 of arXiv 2405.01814v2
        assert isinstance(lamina, Offloaded)
        assert isinstance(vllm, Colocated)
        assert (lamina.model_count, lamina.attention_count, vllm.tensor_parallel) == (a, b, whole)
    choice = Choice(model("llama-3-70b"), known)
    apart = build("disaggregated:H100x4+h20x2", choice)
    assert isinstance(apart, Disaggregated)
    assert (apart.prefill.tensor_parallel, apart.decode.device.name) == (4, "h20")
    hosts = build("lamina-cpu", choice)
    assert isinstance(hosts, Offloaded)
    assert (hosts.attention_device.kind, hosts.link.name) == ("cpu", "ethernet-25g")
    many = build("lamina:h100x2+h20x9", choice)
    assert isinstance(many, Offloaded)
    assert many.shard == "sequence"
    assert with_efficiency(known, known.engines["vllm"]).device("h100").efficiency == known.engines["vllm"]
    assert with_efficiency(known, ROOFLINE).device("h100").efficiency == ROOFLINE


def test_an_engine_with_workers_behind_it_stands_beside_it_alone(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.toml"
    inventory.write_text(INVENTORY.replace('"h20"', '"epyc-genoa"'), encoding="utf-8")
    words = ["plan", "--behind", "vllm", "--inventory", str(inventory), "--no-verify", *FEW]
    result = lamina(*words)
    assert result.exit_code == 0, result.output
    for said in (
        "\nTake vLLM ",
        "with workers  alone, same GPUs",
        "tokens of KV that fit",
        "a decode step of these, ms",
        "$ a million output tokens",
        "with workers: vLLM on 2x h100, KV on 1x h100",
        "the plugin never ran on a GPU",
        "reach what vllm reached of H100 and H200",
    ):
        assert said in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines())
    found = json.loads(lamina(*words, "--json").stdout)
    assert found["answer"].startswith("Take vLLM ")
    mine, alone = found["ways"]["with workers"], found["ways"]["alone, same GPUs"]
    assert mine["system"] == "vLLM on 2x h100, KV on 1x h100"
    assert mine["kv_tokens"] > alone["kv_tokens"]
    assert mine["step"] > alone["step"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--behind", "foo"], "behind is 'foo'; allowed are vllm"),
        (["--behind", "vllm", "--out", "x.toml"], "--behind and --out were given; allowed is one of the two"),
        (["--behind", "vllm", "--why"], "--behind and --why were given"),
        (["--behind", "vllm", "--efficiency", "sglang"], "--behind and --efficiency were given"),
    ],
)
def test_what_does_not_go_with_an_engine_behind_which_workers_are(words: list[str], said: str) -> None:
    result = lamina("plan", *words)
    assert result.exit_code != 0
    assert said in str(result.exception or "") + result.output
