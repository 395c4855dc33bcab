"""Prompts that are scored or embedded over HTTP, beside transformers."""

from __future__ import annotations

import base64
import json
import math
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
import torch
from reference_models import reference as tiny_model
from server_rig import Rig, serving
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from lamina import LLM, InvalidRequest

PROMPT = "The capital of France is Paris."
TEXTS = ["The cat sat on the mat.", "A kitten lay on the rug.", "Interest rates rose by a quarter of a point."]


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_model("llama", {"vocab_size": 300, "max_position_embeddings": 1024, "tie_word_embeddings": True})


@pytest.fixture(scope="module")
def llm(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("tiny")
    reference.save_pretrained(folder)
    letters = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    spelling = tokenizers.Tokenizer(BPE({letter: at for at, letter in enumerate(letters)}, []))
    spelling.pre_tokenizer, spelling.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    spelling.add_special_tokens(letters[:3])
    spelling.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    with LLM(folder, threads=1, weights="float32", kv_memory="64MiB", max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def rig(llm: LLM) -> Iterator[Rig]:
    with serving(llm) as rig:
        yield rig


@torch.inference_mode()
def hidden(reference: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = reference.model(torch.tensor([ids])).last_hidden_state[0]
    return found


@torch.inference_mode()
def logprobs(reference: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    return found


def tokens(rig: Rig, text: str) -> list[int]:
    ids: list[int] = rig.ask("/tokenize", {"prompt": text}).json["tokens"]
    return ids


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_is_what_evaluation_reads(rig: Rig, reference: Any, max_tokens: int) -> None:
    ids = tokens(rig, PROMPT)
    whole = logprobs(reference, ids)
    for prompt in (PROMPT, ids):
        reply = rig.complete(prompt, max_tokens=max_tokens, echo=True, logprobs=2, temperature=0).json
        (choice,) = reply["choices"]
        found = choice["logprobs"]
        assert choice["text"].startswith(PROMPT)
        assert choice["finish_reason"] == "length"
        assert len(found["tokens"]) == len(ids) + max_tokens == len(found["text_offset"])
        assert "".join(found["tokens"]) == choice["text"]
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        for at, target in enumerate(ids[1:]):
            assert found["token_logprobs"][at + 1] == pytest.approx(float(whole[at, target]), abs=1e-3)
            best = max(found["top_logprobs"][at + 1].values())
            assert best == pytest.approx(float(whole[at].max()), abs=1e-3)
            assert len(found["top_logprobs"][at + 1]) in (2, 3)
        assert reply["usage"]["completion_tokens"] == max_tokens


def test_prompt_logprobs_have_ids_and_ranks(rig: Rig, reference: Any, llm: LLM) -> None:
    ids = tokens(rig, PROMPT)
    whole = logprobs(reference, ids)
    reply = rig.complete(PROMPT, prompt_logprobs=1, n=2, seed=1, temperature=1).json
    first, second = (choice["prompt_logprobs"] for choice in reply["choices"])
    assert first == second
    assert first[0] is None
    assert len(first) == len(ids)
    for at, target in enumerate(ids[1:]):
        own = first[at + 1][str(target)]
        assert own["rank"] == int((whole[at] > whole[at, target]).sum()) + 1
        assert own["logprob"] == pytest.approx(float(whole[at, target]), abs=1e-3)
        assert {entry["rank"] for entry in first[at + 1].values()} == {1, own["rank"]}
    chat = rig.chat(prompt_logprobs=0).json
    assert chat["prompt_logprobs"][0] is None
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    said = llm.generate(PROMPT, prompt_logprobs=2, max_tokens=0)
    assert said.text == ""
    assert said.prompt_logprobs is not None
    assert [entry and entry.logprob for entry in said.prompt_logprobs][1:] == pytest.approx(
        [float(whole[at, target]) for at, target in enumerate(ids[1:])], abs=1e-3
    )
    assert said.prompt_logprobs[-1] == said.prompt_logprobs[len(ids) - 1]
    assert len(said.prompt_logprobs[1:3]) == 2


@pytest.mark.parametrize("pooling", ["last", "mean", "eos"])
def test_embeddings_are_the_models_hidden_states(rig: Rig, reference: Any, llm: LLM, pooling: str) -> None:
    reply = rig.ask("/v1/embeddings", {"input": TEXTS, "pooling": pooling}).json
    every = [tokens(rig, text) for text in TEXTS]
    if pooling == "eos":
        every = [[*ids, reference.config.eos_token_id] for ids in every]
    assert [item["index"] for item in reply["data"]] == [0, 1, 2]
    assert reply["usage"] == {"prompt_tokens": sum(map(len, every)), "total_tokens": sum(map(len, every))}
    for item, ids in zip(reply["data"], every, strict=True):
        states = hidden(reference, ids)
        wanted = states.mean(0) if pooling == "mean" else states[-1]
        wanted = wanted / wanted.norm()
        assert torch.allclose(torch.tensor(item["embedding"]), wanted, atol=1e-4)
    short = rig.ask(
        "/v1/embeddings", {"input": every[0], "dimensions": 5, "encoding_format": "base64", "pooling": pooling}
    ).json["data"]
    found = array("f", base64.b64decode(short[0]["embedding"]))
    whole = reply["data"][0]["embedding"][:5]
    assert list(found) == pytest.approx([value / math.hypot(*whole) for value in whole], abs=1e-5)
    embedded = llm.embed(TEXTS, pooling=pooling)
    assert isinstance(embedded, list)
    assert list(embedded[1].embedding) == pytest.approx(reply["data"][1]["embedding"], abs=1e-5)
    assert embedded[1].prompt_tokens == len(every[1])


def test_many_inputs_take_turns_and_free_their_kv(rig: Rig) -> None:
    reply = rig.ask("/v1/embeddings", {"input": [f"Number {n}." for n in range(150)], "dimensions": 3}).json
    assert [len(item["embedding"]) for item in reply["data"]] == [3] * 150
    assert rig.tickets == 0
    assert len({tuple(item["embedding"]) for item in reply["data"]}) == 150


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_documents_are_ordered_by_their_cosine(rig: Rig, path: str) -> None:
    documents = [TEXTS[2], {"text": TEXTS[0]}, TEXTS[1]]
    reply = rig.ask(path, {"query": TEXTS[0], "documents": documents, "pooling": "mean"}).json
    best, *others = reply["results"]
    assert best["index"] == 1
    assert best["document"] == {"text": TEXTS[0]}
    assert best["relevance_score"] == pytest.approx(1, abs=1e-5)
    assert best["relevance_score"] > others[0]["relevance_score"] >= others[1]["relevance_score"]
    short = rig.ask(path, {"query": TEXTS[0], "documents": documents, "top_n": 1, "return_documents": False}).json
    assert [set(result) for result in short["results"]] == [{"index", "relevance_score"}]


def test_arguments_of_embed_are_checked(llm: LLM) -> None:
    one = llm.embed("The cat", normalize=False)
    assert not isinstance(one, list)
    assert math.hypot(*one.embedding) != pytest.approx(1)
    for fields, said in (
        ({"pooling": "cls"}, "pooling is 'cls'; allowed are last, mean, eos"),
        ({"dimensions": 0}, "dimensions is 0; allowed is an integer of 1 or more"),
        ({"dimensions": 65}, "dimensions is 65; allowed with this model are 1 to 64"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            llm.embed("The cat", **fields)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="max_tokens is 0; allowed is 1 or more beside regex"):
        llm.generate("The", max_tokens=0, regex="a+")


LONG = "word" * 100
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("/v1/embeddings", {"input": ""}, "input", "at least one character"),
    ("/v1/embeddings", {"input": []}, "input", "at least one"),
    ("/v1/embeddings", {"input": ["a", 1]}, "input[1]", "text or token ids"),
    ("/v1/embeddings", {"input": [[1, -1]]}, "input", "token id -1"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "input", "at most 2048"),
    ("/v1/embeddings", {"input": "a", "dimensions": 65}, "dimensions", "1 to 64"),
    ("/v1/embeddings", {"input": LONG + LONG}, "input", "maximum context length"),
    ("/v1/rerank", {"query": "a", "documents": []}, "documents", "at least one"),
    ("/v1/rerank", {"query": "a", "documents": ["b", {"image": "c"}]}, "documents[1]", "an object with text"),
    ("/v1/rerank", {"query": LONG + LONG, "documents": ["b"]}, "query", "maximum context length"),
    ("/v1/rerank", {"query": "a", "documents": ["b", LONG + LONG]}, "documents", "maximum context length"),
    ("/v1/rerank", {"query": "a", "documents": ["b", "c" * 500_000]}, "documents[1]", "has 500000 characters"),
]


@pytest.mark.parametrize(("path", "fields", "param", "said"), BAD, ids=[f"{at}" for at in range(len(BAD))])
def test_bad_input_is_refused_by_name(rig: Rig, path: str, fields: dict[str, Any], param: str, said: str) -> None:
    reply = rig.ask(path, fields)
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param
    assert said in reply.error["message"]
