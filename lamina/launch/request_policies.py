"""The policies that requests may name, for the holders of one engine: checked, and what is kept under them."""

from __future__ import annotations

from collections.abc import Callable

from lamina.kv.pages import PageGroup, PolicyKv
from lamina.policy_file import AUTO
from lamina_protocols.messages.layers import STATES, HolderConfig
from lamina_workers.errors import PolicyError
from lamina_workers.policies.catalogue import parse
from lamina_workers.policies.policy import LONGEST, Policy

_KNOWN = 256  # policies whose groups are kept at a time


class RequestPolicies:
    """Gives the `PolicyKv` of each text. "" is what the engine's own policy makes of KV, which may differ by head.
    `groups(policy)` says what is kept, and raises PolicyError where the holders cannot serve a policy."""

    def __init__(self, holder: HolderConfig, groups: Callable[[str], tuple[tuple[PageGroup, ...], ...]]) -> None:
        self._groups = groups
        attention = [spec for spec in holder.layers if spec.kind not in STATES]
        texts = dict.fromkeys(text for spec in attention for text in spec.policies or ("full",))
        self._own = tuple(map(parse, texts))
        self._of: dict[str, PolicyKv] = {}  # not an lru_cache, which no Ray actor could send
        self._engine = self._kv("", self._own)

    def __call__(self, text: str) -> PolicyKv:
        """What becomes of KV under a policy. Raises PolicyError where the text is none, or the engine cannot serve it.
        Any thread may call."""
        if not text:
            return self._engine
        found = self._of.get(text)
        if found is None:
            found = self._known(text)
            if len(self._of) >= _KNOWN:
                self._of.clear()
            self._of[text] = found
        return found

    def _known(self, text: str) -> PolicyKv:
        policy = parse(AUTO if text == "auto" else text)
        if set(self._own) == {policy}:
            return self._engine
        if not self._own:
            raise PolicyError(f"the policy is {text!r:.80}; allowed is none: no layer of this model keeps KV")
        return self._kv(str(policy), (policy,))

    def _kv(self, name: str, policies: tuple[Policy, ...]) -> PolicyKv:
        return PolicyKv(
            name,
            self._groups(name),
            all(_keys_seen(policy, LONGEST) == LONGEST + 1 for policy in policies),
            any(policy.adaptive or policy.compensated or policy.evicts for policy in policies),
        )


def _keys_seen(policy: Policy, position: int) -> int:
    """How many keys a query of a prompt sees there."""
    (view,) = policy.views(position, 1)
    return view.keys(position, 0, position + 1)
