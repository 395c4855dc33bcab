"""All policies by name. A new one is a file beside this one, and a line here."""

from __future__ import annotations

from lamina_workers.policies.full import Full
from lamina_workers.policies.heavy_hitter import HeavyHitter
from lamina_workers.policies.page_top_k import PageTopK
from lamina_workers.policies.policy import Policy
from lamina_workers.policies.razor import Razor
from lamina_workers.policies.recycled import Recycled
from lamina_workers.policies.retrieval import Retrieval
from lamina_workers.policies.sharded import Sharded
from lamina_workers.policies.span import Span
from lamina_workers.policies.streaming import Streaming

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (Full, Streaming, Span, Sharded, Retrieval, PageTopK, Recycled, HeavyHitter, Razor)
}
