"""What words of the simulator's commands mean: limits, rates, policies, drafts, failures. All raise InvalidRequest."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Protocol

from lamina.errors import InvalidRequest

if TYPE_CHECKING:
    from lamina.simulator.costs.cost_model import KvPolicy, Speculation
    from lamina.simulator.event_loop.failures import Failures
    from lamina.simulator.event_loop.simulate import Slo

DEFAULT_SLO = "tpot=100ms,ttft=2s"
_SLO = re.compile(r"(ttft|tpot)=(\d{1,9}(?:\.\d{1,9})?)(us|ms|s)", re.ASCII)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_slo(words: str) -> Slo:
    """Such as "tpot=100ms,ttft=2s", each at most once; "none" for any time. Raises InvalidRequest."""
    from lamina.simulator.event_loop.simulate import Slo

    given: dict[str, float] = {}
    for word in [] if words.strip() == "none" else words.split(","):
        found = _SLO.fullmatch(word.strip())
        if found is None or found[1] in given or not float(found[2]):
            raise InvalidRequest(
                f"slo is {words!r:.80}; allowed are ttft and tpot, once each, above 0, with us, ms or s, such as "
                f'"{DEFAULT_SLO}", or "none"'
            )
        given[found[1]] = float(found[2]) * _UNITS[found[3]]
    return Slo(**given)


def parse_rate(words: str) -> float | None:
    """Requests a second: None for "trace", infinite for "max". Raises InvalidRequest."""
    if words in ("trace", "max"):
        return None if words == "trace" else math.inf
    try:
        value = float(words)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e6:  # NaN compares false
        raise InvalidRequest(f"rate is {words!r:.80}; allowed are trace, max, or requests a second up to 1e6")
    return value


def parse_policy(words: str | None) -> KvPolicy:
    """The policy in words such as "auto=0.31,1": its name, and the shares of the KV read and held. None: everything is
    read and held. Raises InvalidRequest."""
    from lamina.simulator.costs.cost_model import FULL, KvPolicy

    if words is None:
        return FULL
    name, _, shares = words.rpartition("=")
    try:
        if not name:
            raise ValueError("it has no name")
        read, held = (float(share) for share in shares.split(","))
    except ValueError as error:
        raise InvalidRequest(f"policy is {words!r:.80}; allowed is NAME=READ,HELD, such as auto=0.31,1") from error
    return KvPolicy(name, read, held)


class SpeculationOptions(Protocol):
    """What `plan` and `simulate` are asked about drafts."""

    @property
    def speculate(self) -> str | None: ...
    @property
    def num_speculative_tokens(self) -> int: ...
    @property
    def acceptance(self) -> float | None: ...
    @property
    def proposed(self) -> float: ...


def parse_speculation(asked: SpeculationOptions) -> Speculation | None:
    """What drafts, with its acceptance; None where nothing does. Raises InvalidRequest."""
    from lamina.simulator.costs.cost_model import NGRAM, Speculation
    from lamina.simulator.costs.model_configs import model as shape_of

    name, acceptance = asked.speculate, asked.acceptance
    if name is None:
        if acceptance is not None or asked.proposed != 1:
            raise InvalidRequest("--acceptance or --proposed was given; it needs --speculate")
        return None
    if acceptance is None:
        raise InvalidRequest(
            "--speculate was given; it needs --acceptance, from 0 to 1: of the first drafts of rows, how many were "
            "accepted, as `Completion.stats` or /metrics count them"
        )
    draft = None if name == NGRAM else shape_of(name)
    return Speculation(acceptance, asked.num_speculative_tokens, asked.proposed, name, draft)


def parse_failures(every: float | None, redundancy: str, restart: float) -> Failures | None:
    """Workers that are lost, one of each instance every so many seconds; None where none is. Raises InvalidRequest."""
    from lamina.simulator.event_loop.failures import Failures

    if every is None:
        if redundancy != "none" or restart != 10.0:
            raise InvalidRequest("--redundancy or --worker-restart was given; it needs --lose-worker-every")
        return None
    return Failures(every, redundancy, restart)
