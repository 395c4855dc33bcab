"""From what a user calls a policy to one for each layer and KV head. Knows the names; the policies know themselves."""

from __future__ import annotations

from pathlib import Path

from lamina_workers.decoder.config import ModelConfig
from lamina_workers.errors import PolicyError
from lamina_workers.policies.catalogue import parse

AUTO = "retrieval"  # exact while that is as fast, else by sketches of pages: measured in docs/long_context.md


def head_policies(
    policy: str | Path | None, model: ModelConfig, fingerprint: str
) -> tuple[tuple[str, ...], ...] | None:
    """Per layer, for each KV head, how it is read and kept; None where that is everything.

    `fingerprint` is that of the model's files. Raises PolicyError for a policy that is unknown, contradicts itself, or
    is for another model.
    """
    if policy is None or policy == "full":
        return None
    if isinstance(policy, Path) or policy.endswith(".toml"):
        from lamina.policy_file import read

        file = read(Path(policy))
        try:
            file.check(model, fingerprint)
        except PolicyError as error:
            raise PolicyError(f"{policy}: {error}") from error
        return file.policies(model.num_hidden_layers, model.num_key_value_heads)
    text = AUTO if policy == "auto" else policy
    try:
        canonical = str(parse(text))
    except PolicyError as error:
        raise PolicyError(
            f'policy is {policy!r:.80}: {error}; also allowed are "auto" and a file ending in .toml'
        ) from error
    return ((canonical,) * model.num_key_value_heads,) * model.num_hidden_layers
