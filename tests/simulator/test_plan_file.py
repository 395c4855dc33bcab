"""Plan files: written and read back equal, deployed, and refused with the reason where they are wrong."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning import BIG, EPYC, FHBN, H20, H100, dop, together

from lamina.config import EngineConfig
from lamina.errors import InvalidRequest
from lamina.llm import LLM
from lamina.simulator.costs.cost_model import KvPolicy
from lamina.simulator.costs.hardware import Device, Link
from lamina.simulator.costs.models import model
from lamina.simulator.costs.speculation import Speculation
from lamina.simulator.costs.systems import Colocated, Disaggregated, Offloaded, System
from lamina.simulator.costs.tables import MAX_BYTES
from lamina.simulator.event_loop.simulate import Slo
from lamina.simulator.planning.plan_file import Plan, Prediction, TraceSummary, dumps, engine_keywords, read, write

HERE = Device("here", "cpu", flops=1e11, memory=8e9, bandwidth=2e10, price=0.1)
SYSTEMS: dict[str, System] = {
    "colocated": together(4),
    "whole prompts": replace(together(4), chunked_prefill=False, max_sequences=77),
    "disaggregated": Disaggregated(prefill=together(2), decode=together(4, H20), link=FHBN),
    "prompts, dense layers and attention apart": Disaggregated(prefill=together(2), decode=dop(2, 2), link=FHBN),
    "kept in both tiers": dop(2, 2, lanes=2, local_share=0.4, attention_memory_share=0.98),
    "replicas": dop(2, 2, lanes=3, model_replicas=2),
    "offloaded": dop(2, 4, lanes=2, policy=KvPolicy("streaming(sink=64, recent=256)", 0.3, 0.4, 4096)),
    "on hosts": dop(2, 3, attention=EPYC, shard="sequence", workers=6),
    "experts": Colocated(model=model("qwen3-30b-a3b"), device=H100),
    "states": replace(dop(2, 4), model=model("kimi-linear-48b-a3b"), shard="sequence", sequence_tokens=1000),
    "packed": Colocated(model=BIG.with_weights("int4"), device=EPYC),
    "a mix": Colocated(model=BIG.with_weights("0.61"), device=EPYC),
    "n-grams": replace(dop(2, 4), speculation=Speculation(0.7, 8, 0.5)),
    "drafts": replace(together(4), speculation=Speculation(0.7, 4, name="./draft", draft=model("llama-3-8b"))),
    "choices": Colocated(model=model("glm-5"), device=replace(H100, memory=1e12), tensor_parallel=8),
}
PREDICTED = Prediction("closed form", 4.0, 800.0, 0.03, 0.5, 0.99, 41.5, 44.24, 15.4)
TRACE = TraceSummary("azure-conv", 19366, 5.53, 1154.7, 211.1, 1227.0)


def plan_of(system: System, **more: Any) -> Plan:
    given: dict[str, Any] = {
        "model": "llama-3-70b",
        "predicted": PREDICTED,
        "trace": TRACE,
        "slo": Slo(ttft=2.0),
        "engine": engine_keywords(system, 4096),
    }
    return Plan(system=system, **given | more)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_what_is_written_is_read_back_equal(kind: str, tmp_path: Path) -> None:
    plan = plan_of(SYSTEMS[kind], replicas=3)
    write(tmp_path / "plan.toml", plan)
    again = read(tmp_path / "plan.toml")
    assert again == plan
    assert again.system == plan.system
    assert dumps(again) == dumps(plan)


@given(
    name=st.text(max_size=30),
    price=st.floats(0, 1e6),
    bandwidth=st.floats(1, 1e16),
    read_share=st.floats(1e-6, 1.0),
    tokens=st.integers(1, 1 << 20),
)
def test_any_numbers_and_names_come_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, price: float, bandwidth: float, read_share: float, tokens: int
) -> None:
    system = Colocated(
        model=replace(BIG, name=name),
        tensor_parallel=4,
        device=replace(H20, price=price, bandwidth=bandwidth),
        batch_tokens=tokens,
        policy=KvPolicy(name, read_share),
        label=name,
    )
    plan = plan_of(system, model=name, trace=replace(TRACE, name=name), engine={})
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(dumps(plan), encoding="utf-8", newline="\n")
    assert read(file) == plan


def test_the_engine_has_what_the_plan_counts_on() -> None:
    offloaded = engine_keywords(dop(2, 4, lanes=2), 4096)
    assert offloaded == {
        "max_batch_tokens": 2048, "attention_workers": 4, "shard": "heads", "cluster": "auto",
        "kv_memory": pytest.approx(0.9 * 96e9, rel=1e-6), "local_share": 0,
        "model_workers": 2, "model_parallel": "tensor",
    }  # fmt: skip
    EngineConfig(**{**offloaded, "kv_memory": int(offloaded["kv_memory"])})
    alone = replace(dop(2, 4, lanes=2), model=model("smollm2-135m"), model_count=1)
    assert engine_keywords(alone, 4096)["lanes"] == 2
    half = engine_keywords(dop(2, 4, policy=KvPolicy("auto", 0.3, 0.5)), 4096)
    assert half["kv_memory"] == pytest.approx(0.9 * 96e9, rel=1e-6)  # what is held less makes room for more tokens
    assert half["policy"] == "auto"
    alone = engine_keywords(together(4), 4096)
    assert "attention_workers" not in alone
    assert alone["kv_memory"] == pytest.approx(0.9 * 4 * 80e9 - BIG.weight_bytes, rel=1e-5)  # whole tokens
    assert engine_keywords(replace(together(4), chunked_prefill=False), 5000)["max_batch_tokens"] == 5000


def test_the_engine_keeps_weights_and_drafts_as_planned() -> None:
    assert engine_keywords(SYSTEMS["packed"], 4096)["quantize"] == "int4"
    assert engine_keywords(SYSTEMS["a mix"], 4096)["weights"] == "packed"
    drafts = engine_keywords(SYSTEMS["drafts"], 4096)
    assert (drafts["speculate"], drafts["num_speculative_tokens"]) == ("./draft", 4)
    ngrams = engine_keywords(SYSTEMS["n-grams"], 4096)
    assert (ngrams["speculate"], ngrams["num_speculative_tokens"]) == ("ngram", 8)
    assert not {"weights", "quantize", "speculate"} & engine_keywords(together(4), 4096).keys()


def test_a_plan_says_that_no_gpu_keeps_weights_packed() -> None:
    packed = plan_of(replace(together(4), model=BIG.with_weights("int4")))
    assert packed.remarks() == ["weights stay packed on CPUs alone, so an engine on h100 computes with 16 bits"]
    assert "quantize" not in packed.engine
    assert plan_of(SYSTEMS["packed"]).remarks() == []


def test_devices_without_a_network_are_one_machine() -> None:
    small = model("smollm2-135m")
    socket = Link("socket", 2e9, 9e-5)
    local = Offloaded(model=small, model_device=HERE, attention_device=HERE, link=socket, workers=2)
    keywords = engine_keywords(local, 1000)
    assert "cluster" not in keywords
    assert keywords["attention_workers"] == 2
    assert keywords["kv_memory"] == pytest.approx(0.9 * 8e9 / 2, rel=1e-6)


class Recording(LLM):
    """Keeps what it would load."""

    def __init__(self, model: str | Path, *, progress: Any = None, **config: Any) -> None:
        self.asked = (model, progress, config)


def test_a_plan_is_deployed_and_what_is_given_besides_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "plan.toml"
    write(file, plan_of(dop(2, 4, lanes=2), replicas=2))
    llm = Recording.from_plan(file)
    assert isinstance(llm, Recording)
    assert llm.asked[0] == "llama-3-70b"
    assert llm.asked[2]["attention_workers"] == 4
    assert (llm.asked[2]["model_workers"], llm.asked[2]["model_parallel"], llm.asked[2]["local_share"]) == (
        2,
        "tensor",
        0,
    )
    assert "lanes" not in llm.asked[2]  # ranks have one batch under way
    assert "2 replicas" in caplog.text
    other = Recording.from_plan(file, model="smollm2-135m", cluster=None, attention_workers=1, progress=print)
    assert isinstance(other, Recording)
    assert other.asked[:2] == ("smollm2-135m", print)
    assert (other.asked[2]["cluster"], other.asked[2]["attention_workers"], other.asked[2]["model_workers"]) == (
        None,
        1,
        2,
    )


def test_what_no_engine_does_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    write(file, plan_of(SYSTEMS["disaggregated"]))
    with pytest.raises(InvalidRequest, match="allowed are plans of kind colocated and offloaded"):
        Recording.from_plan(file)


WRONG = [
    ("version = 1", "version = 2", "version is 2; allowed is 1"),
    ("version = 1", "version = true", "version is True"),
    ("version = 1", "version = 1\nspeed = 3", "'speed'; allowed are version, model"),
    ('model = "llama-3-70b"\n', "", "has no model"),
    ('model = "llama-3-70b"', "model = 3", "model is 3; allowed is a text"),
    ("replicas = 1", "replicas = 0", "replicas is 0; allowed are whole numbers from 1"),
    ("replicas = 1", 'replicas = "many"', "replicas is 'many'"),
    ('kind = "offloaded"', 'kind = "magic"', "kind is colocated, disaggregated, offloaded"),
    ('kind = "offloaded"', 'kind = "colocated"', "system has the key 'model_device'; allowed are device"),
    ('link = "fhbn-400g"', 'link = "none"', "unknown link 'none'; known are fhbn-400g"),
    ('link = "fhbn-400g"\n', "", "system has no link; it is needed"),
    ("model_count = 2", "model_count = 0", "model_count is 0; allowed are whole numbers from 1"),
    ("model_count = 2", "model_count = 2.0", "system.model_count is 2.0; allowed are whole numbers"),
    ("model_count = 2", "model_count = true", "system.model_count is True"),
    ("lanes = 2\npolicy", "lanes = -2\npolicy", "lanes is -2"),
    ("tpot = 0.03", "tpot = nan", "predicted.tpot is nan; allowed is a number from 0"),
    ("tpot = 0.03", "tpot = inf", "predicted.tpot is inf"),
    ("tpot = 0.03", "tpot = -1", "predicted.tpot is -1"),
    ("tpot = 0.03\n", "", "predicted has no tpot"),
    ("ttft = 2.0", "ttft = 0", "ttft of the SLO is 0"),
    ("ttft = 2.0", "first = 2.0", "slo has the key 'first'; allowed are ttft, tpot"),
    ("price = 4.63", "price = -4.63", "device 'h20': price is -4.63"),
    ("hidden = 8192", 'hidden = "8192"', "shape.hidden is '8192'; allowed are whole numbers"),
    ("groups = [", "groups = [3, ", "shape.groups[0] is 3; allowed is a table"),
    ("groups = [", "groups = 3 #", "shape.groups is 3; allowed is a list"),
    ("read = 0.3", "read = 3.0", "read of policy 'auto' is 3.0"),
    ('cluster = "auto"', "insecure = true", "engine has the key 'insecure'; allowed are dtype"),
    ('cluster = "auto"', 'token_file = "/etc/passwd"', "engine has the key 'token_file'"),
    ("attention_workers = 4", 'attention_workers = ["a:1"]', "allowed is a whole number"),
    ("attention_workers = 4", "attention_workers = 4000", "attention_workers is 4000; allowed are 0 to 1024"),
    ("[engine]", "[[engine]]", "engine is ["),
    ("[system]", "[[system]]", "allowed is a table"),
    ("[engine]", "[engine", "not TOML"),
]


@pytest.mark.parametrize(("old", "new", "said"), WRONG)
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = dumps(plan_of(dop(2, 4, lanes=2, policy=KvPolicy("auto", 0.3))))
    assert old in text
    file = tmp_path / "plan.toml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InvalidRequest) as caught:
        read(file)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(file))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no such file"):
        read(tmp_path / "plan.toml")
    (tmp_path / "large.toml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(InvalidRequest, match="more than"):
        read(tmp_path / "large.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        read(tmp_path / "binary.toml")
    with pytest.raises(InvalidRequest, match="cannot be written"):
        write(tmp_path / "no" / "such" / "folder.toml", plan_of(together(4)))


def test_two_devices_of_one_name_have_no_place_in_a_plan() -> None:
    with pytest.raises(InvalidRequest, match="two devices are called 'h100'"):
        dumps(plan_of(dop(2, 4, attention=replace(H100, price=1.0)), engine={}))


@given(st.data())
def test_a_damaged_file_is_refused_or_read_but_never_worse(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = dumps(plan_of(dop(2, 4))).splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        lines[at] = data.draw(st.sampled_from([lines[at][:-3], "", lines[at] * 2, "x = [[]]", lines[at].upper()]))
    file = tmp_path_factory.getbasetemp() / "damaged.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    with suppress(InvalidRequest):
        read(file)
