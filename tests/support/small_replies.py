"""Small tokenizers with the marks of a family of models, and what a plan's grammar and parser make of a text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from small_grammars import small_tokenizer

from lamina.sampling_params import SamplingParams
from lamina.server.chat.reply_format import ReplyPlan
from lamina.text.structured_output import Grammars
from lamina.text.tokenizer import Tokenizer

EOS = "<eos>"
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


def tokenizer_with(
    folder: Path, template: str, special: Sequence[str] = (), single: Sequence[str] = (), ends: Sequence[str] = ()
) -> Tokenizer:
    """A token for each byte, `special` tokens, and others that are one token each; `ends` and EOS end a text."""
    described = json.loads(small_tokenizer().to_str())
    words = described["model"]["vocab"]
    for text in (*special, *single):
        index = max(*words.values(), *(token["id"] for token in described["added_tokens"])) + 1
        described["added_tokens"].append(
            {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": text in special}
        )  # fmt: skip
        words[text] = index
    ids = [words.get(end, 257) for end in (EOS, *ends)]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": EOS}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return Tokenizer(folder)


def grammars_of(tokenizer: Tokenizer) -> Grammars:
    """The grammars over a tokenizer, for a model with a few more logits."""
    return Grammars(tokenizer.to_json, tokenizer.eos_ids, tokenizer.vocab_size + 9)


def allowed(constraint: Any) -> set[int]:
    """The tokens that may come next."""
    return set(map(int, np.flatnonzero(np.unpackbits(constraint.allowed.view(np.uint8), bitorder="little"))))


def accepts(tokenizer: Tokenizer, plan: ReplyPlan, text: str) -> bool:
    """Whether a text is allowed as a whole."""
    if "grammar" not in plan.params and "json_schema" not in plan.params:
        return True
    constraints = {name: value for name, value in plan.params.items() if name != "skip_special_tokens"}
    [constraint] = grammars_of(tokenizer).constraints(SamplingParams(**constraints), 1)
    for token in tokenizer.encode(text, add_special_tokens=False):
        if constraint.finished or token not in allowed(constraint):
            return False
        constraint.advance(token)
    return constraint.finished or tokenizer.eos_ids[0] in allowed(constraint)


def taken_apart(plan: ReplyPlan, pieces: Iterable[str]) -> tuple[str, str, list[tuple[str, Any]]]:
    """The reasoning, the content and the calls (name and arguments) of a text that comes in pieces."""
    parser = plan.parser()
    if parser is None:
        return "", "".join(pieces), []
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    calls: list[list[str]] = []
    for delta in deltas:
        kinds = [kind is not None for kind in (delta.reasoning, delta.content, delta.index)]
        assert sum(kinds) == 1
        assert "" not in (delta.reasoning, delta.content)
        if delta.name is not None:
            assert delta.id
            calls.append([delta.name, ""])
        if delta.index is not None:
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.arguments
    assert parser.calls == len(calls)
    return (
        "".join(delta.reasoning or "" for delta in deltas),
        "".join(delta.content or "" for delta in deltas),
        [(name, arguments) for name, arguments in calls],
    )


def cut_at(text: str, cuts: Iterable[int]) -> list[str]:
    """The pieces between the cuts."""
    return [text[begin:end] for begin, end in itertools.pairwise([0, *sorted(cuts), len(text)])]
