"""Requests that are generated from the OpenAPI document, right and wrong ones: no answer contradicts the document, and
replies are what OpenAI's own package reads."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion
from openai.types.responses import InputTokenCountResponse, Response
from pydantic import BaseModel
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as conformance
from server_rig import MODEL, Rig, serving

from lamina import LLM

pytestmark = [pytest.mark.data, pytest.mark.soak]

EXAMPLES = 40  # an operation
REPLIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/embeddings": CreateEmbeddingResponse,
    "/v1/models/{model_id}": Model,
    "/v1/responses": Response,
    "/v1/responses/input_tokens": InputTokenCountResponse,
}


def reply_is_what_the_openai_package_reads(
    context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    kind = REPLIES.get(case.path)
    if kind is None or response.status_code != 200 or "application/json" not in response.headers["content-type"]:
        return
    reply = response.json()
    if kind is CreateEmbeddingResponse:
        for item in reply["data"]:
            if isinstance(item["embedding"], str):  # base64, which the package decodes before
                item["embedding"] = np.frombuffer(base64.b64decode(item["embedding"], validate=True), "<f4").tolist()
    kind.model_validate(reply)


CHECKS = [
    reply_is_what_the_openai_package_reads,
    not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_schema_conformance,
    conformance.response_headers_conformance,
    conformance.negative_data_rejection,
]
MOST_TOKENS = 4
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with LLM(MODEL, threads=1, kv_memory="256MiB", max_model_len=256) as llm, serving(llm) as rig:
        yield rig


def short(body: Any) -> None:
    """Right requests ask for little: generating takes time, and proves nothing here."""
    if not isinstance(body, dict):
        return
    kinds = [kind for kind in ("messages", "prompt", "input") if kind in body]
    for name in LIMITS:
        if type(body.get(name)) is int and MOST_TOKENS < body[name] < 2**31:
            body[name] = MOST_TOKENS
    if kinds and "input" not in kinds:
        body.setdefault("max_tokens", MOST_TOKENS)
    if "input" in kinds and "encoding_format" not in body:
        body.setdefault("max_output_tokens", MOST_TOKENS)
    if type(body.get("n")) is int and 2 < body["n"] <= 256:
        body["n"] = 2


@pytest.mark.fault("F23")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_document_holds(rig: Rig, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{rig.url}/openapi.json")
    tried: list[str] = []
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode == GenerationMode.NEGATIVE and not operation.body:
            continue  # there is nothing in it that could be wrong

        @given(case=operation.as_strategy(mode))
        @settings(
            max_examples=EXAMPLES if operation.method == "post" else 3,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            short(case.body)
            tried.append(case.operation.label)
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()
    assert len(tried) >= 4 * EXAMPLES / 2
    assert rig.complete(max_tokens=1).status == 200
