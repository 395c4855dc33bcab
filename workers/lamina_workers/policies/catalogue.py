"""All policies by name, and the parser of their texts. A new policy is a file beside this one, and a line here."""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from typing import Any

from lamina_workers.errors import PolicyError
from lamina_workers.policies.compared.blocks import Dilated, Sharded
from lamina_workers.policies.compared.heavy_hitter import HeavyHitter
from lamina_workers.policies.compared.page_top_k import PageTopK
from lamina_workers.policies.compared.razor import Razor
from lamina_workers.policies.compared.recycled import Recycled
from lamina_workers.policies.compared.span import Span
from lamina_workers.policies.full import Full
from lamina_workers.policies.policy import MAX_TEXT, Policy
from lamina_workers.policies.retrieval import Retrieval
from lamina_workers.policies.streaming import Streaming

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (Full, Streaming, Span, Sharded, Dilated, Retrieval, PageTopK, Recycled, HeavyHitter, Razor)
}


_FORM = re.compile(r"\s*([a-z_0-9]+)\s*(?:\(([^()]*)\)\s*)?")
_PARAMETER = re.compile(r"\s*([a-z_0-9]+)\s*=\s*([-+0-9.eE]+|[a-z]+)\s*")


@lru_cache(maxsize=4096)  # texts come from files and from the wire
def parse(text: str) -> Policy:
    """The policy of a text; parameters left out have their defaults. Raises PolicyError, which names what is wrong and
    what is allowed."""
    form = _FORM.fullmatch(text) if len(text) <= MAX_TEXT else None
    if form is None:
        raise PolicyError(f"a policy is written {text!r:.80}; allowed is name or name(parameter=number, ...)")
    policy_class = POLICIES.get(form[1])
    if policy_class is None:
        raise PolicyError(f"there is no policy {form[1]!r:.40}; allowed are {', '.join(POLICIES)}")
    fields = {f.name: f for f in dataclasses.fields(policy_class)}
    arguments: dict[str, Any] = {}
    for part in (form[2] or "").split(",") if (form[2] or "").strip() else []:
        parameter = _PARAMETER.fullmatch(part)
        name = parameter[1] if parameter else part.strip()
        if parameter is None or name not in fields or name in arguments:
            allowed = f"each once, of {', '.join(fields)}, as name=value" if fields else "none"
            raise PolicyError(f"{policy_class.name} has the parameter {part.strip()!r:.60}; allowed is {allowed}")
        arguments[name] = _value(policy_class.name, name, str(fields[name].type), parameter[2])
    return policy_class(**arguments)


def _value(policy: str, name: str, kind: str, text: str) -> Any:
    try:
        if kind == "str":
            return text
        return int(text) if kind == "int" else float(text)
    except ValueError as error:
        expected = "a whole number" if kind == "int" else "a number"
        raise PolicyError(f"{policy}: {name} is {text!r:.40}; allowed is {expected}") from error
