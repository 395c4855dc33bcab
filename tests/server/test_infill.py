"""Fill in the middle: `suffix` of completions and /infill, beside the same prompt written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server_rig import Rig, serving
from unobserved import Unobserved

from lamina import LLM
from lamina.client.input_processor import InputProcessor
from lamina.server.frontend import Frontend, Served
from lamina.server.openai import infill
from lamina.server.openai.schemas import InfillRequest
from lamina.text.infill import infill_prompt
from lamina.text.tokenizer import Tokenizer

pytestmark = pytest.mark.data

AHEAD, BEHIND = "def larger(a, b):\n    return ", "\n\nprint(larger(1, 2))\n"
WRITTEN = f"<|fim_prefix|>{AHEAD}<|fim_suffix|>{BEHIND}<|fim_middle|>"
SAMPLING = {"temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def tokenizer(steady: LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """SmolLM2's, with three of its tokens under the names of those that fill in."""
    folder, source = tmp_path_factory.mktemp("fim"), steady._runtime.model_path
    text = (source / "tokenizer.json").read_text()
    for old, new in (("<jupyter_start>", "prefix"), ("<jupyter_text>", "suffix"), ("<jupyter_code>", "middle")):
        assert old in text
        text = text.replace(old, f"<|fim_{new}|>")
    (folder / "tokenizer.json").write_text(text)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    made = Tokenizer(folder)
    yield made
    made.close()


@pytest.fixture(scope="module")
def rig(steady: LLM, tokenizer: Tokenizer) -> Iterator[Rig]:
    runtime = steady._runtime
    inputs = InputProcessor(tokenizer, runtime.limits.max_model_len, runtime.possible, runtime.model.vocab_size, {})
    frontend = Frontend(Unobserved())
    frontend.ready(Served(runtime.engine, tokenizer, inputs))
    with serving(None, frontend=frontend) as rig:
        yield rig


def complete(rig: Rig, **fields: Any) -> Any:
    return rig.ask("/v1/completions", {"max_tokens": 8, **SAMPLING, **fields}).json


def test_a_suffix_is_the_prompt_written_with_its_tokens(rig: Rig, tokenizer: Tokenizer) -> None:
    written = complete(rig, prompt=WRITTEN)
    filled = complete(rig, prompt=AHEAD, suffix=BEHIND)
    assert filled["choices"] == written["choices"]
    assert filled["usage"] == written["usage"]
    assert filled["usage"]["prompt_tokens"] == len(tokenizer.encode(WRITTEN))
    assert complete(rig, prompt=AHEAD, suffix="")["usage"]["prompt_tokens"] == len(tokenizer.encode(AHEAD))
    [echoed] = complete(rig, prompt=[AHEAD], suffix=BEHIND, echo=True)["choices"]
    assert echoed["text"] == AHEAD + written["choices"][0]["text"]


def test_an_infill_is_the_same_and_begins_as_it_is_asked_to(rig: Rig, tokenizer: Tokenizer) -> None:
    """With the fields that llama.vim sends."""
    fields = {
        "id_slot": 0, "input_prefix": AHEAD, "input_suffix": BEHIND, "input_extra": [], "prompt": "", "n_predict": 8,
        "stop": [], "n_indent": 4, "samplers": ["top_k", "top_p", "infill"], "stream": False, "cache_prompt": True,
        "t_max_prompt_ms": 500, "t_max_predict_ms": 1000, "response_fields": ["content", "timings/prompt_n"],
    }  # fmt: skip
    fields |= {"ignore_eos": True}
    written = complete(rig, prompt=WRITTEN, ignore_eos=True)["choices"][0]
    answer = rig.ask("/infill", fields | SAMPLING).json
    assert answer["content"] == written["text"]
    assert (answer["stop_type"], answer["tokens_predicted"]) == ("limit", 8)
    assert answer["tokens_evaluated"] == len(tokenizer.encode(WRITTEN))
    begun = rig.ask("/infill", fields | SAMPLING | {"prompt": "a if"}).json
    assert begun["content"] == complete(rig, prompt=WRITTEN + "a if", ignore_eos=True)["choices"][0]["text"]
    assert rig.ask("/infill", fields | SAMPLING | {"ignore_eos": False}).json["stop_type"] == "eos"
    word = written["text"].strip()[:3]
    stopped = rig.ask("/infill", fields | SAMPLING | {"stop": [word]}).json
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", word)
    warmed = rig.ask("/infill", {"input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0}).json
    assert (warmed["content"], warmed["tokens_predicted"]) == ("", 0)


def test_an_infill_has_the_priority_that_is_asked_for(rig: Rig) -> None:
    texts = infill._texts(InfillRequest(input_prefix=AHEAD, priority=3), rig.frontend.served, ("", ""))
    assert [request.request.priority for request in texts.requests] == [3]


def test_other_files_stand_before_the_gap_with_their_names(rig: Rig) -> None:
    extra = [{"filename": "a.py", "text": "x = 1"}, {"text": "y = 2"}]
    counted = rig.ask("/infill", {"input_prefix": AHEAD, "input_suffix": BEHIND, "input_extra": extra, "n_predict": 0})
    plain = complete(rig, prompt=f"x = 1\n\ny = 2\n\n{WRITTEN}", max_tokens=0)
    assert counted.json["tokens_evaluated"] == plain["usage"]["prompt_tokens"]

    class Qwen:
        added_tokens = dict.fromkeys(
            ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")
        )

    prompt = infill_prompt(Qwen(), AHEAD, BEHIND, [("a.py", "x = 1")])  # type: ignore[arg-type]
    assert prompt == f"<|repo_name|>repository\n<|file_sep|>a.py\nx = 1\n<|file_sep|>here\n{WRITTEN}"


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("/v1/completions", {"prompt": [1, 2], "suffix": "x"}, "suffix", "null or empty, where prompt is no text"),
        ("/infill", {"stream": True}, "stream", "an infill is answered whole"),
        ("/infill", {"input_prefix": 1}, "input_prefix", "input_prefix"),
        ("/infill", {"n_predict": -1}, "n_predict", "n_predict"),
        ("/infill", {"input_extra": [{"name": "a"}]}, "input_extra", "input_extra"),
        ("/infill", {"input_prefix": "a " * 600}, "prompt", "maximum context length"),
    ],
)
def test_what_is_wrong_is_named(rig: Rig, path: str, fields: dict[str, Any], param: str, message: str) -> None:
    reply = rig.ask(path, fields)
    assert reply.status == 400
    assert message in reply.json["error"]["message"]
    assert (reply.json["error"]["param"] or "").startswith(param)


def test_a_model_without_such_tokens_says_so(steady: LLM) -> None:
    with serving(steady) as rig:
        for path, fields in (("/v1/completions", {"prompt": "a", "suffix": "b"}), ("/infill", {"input_suffix": "b"})):
            reply = rig.ask(path, fields)
            assert reply.status == 400
            assert "this model has no tokens for filling in; allowed is no suffix" in reply.json["error"]["message"]
