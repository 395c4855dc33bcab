"""What holders' answers to an announcement say of its rows. Pure; told only of holders that the scheduler knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lamina.messages.engine_request import KvSavings
from lamina.scheduling.request import Plan
from lamina_protocols.messages import Announced, Usage
from lamina_protocols.routes import HolderBatch


def floors_of(plan: Plan, shares: Mapping[int, HolderBatch], answers: Mapping[int, Announced]) -> list[int]:
    """For each row the highest floor of its parts."""
    asked = Counter(route.source for number in answers for route in shares[number].routes)
    # A part that was not asked, its range being full, has let go of no more than before.
    floors = [row.sequence.floor if asked[at] < len(row.sequence.layout) else 0 for at, row in enumerate(plan.rows)]
    for number, answer in answers.items():
        for route, floor in zip(shares[number].routes, answer.floors, strict=True):
            floors[route.source] = max(floors[route.source], floor)
    return floors


def spared_of(plan: Plan, shares: Mapping[int, HolderBatch], answers: Mapping[int, Announced]) -> dict[str, KvSavings]:
    """What policies have spared each request, as those parts tell that were asked."""
    told: dict[str, list[Usage]] = {}
    for number, answer in answers.items():
        if len(answer.usages) == len(shares[number].routes):
            for route, usage in zip(shares[number].routes, answer.usages, strict=True):
                told.setdefault(plan.rows[route.source].sequence.request.id, []).append(usage)
    return {request_id: _sum(usages) for request_id, usages in told.items()}


def _sum(usages: list[Usage]) -> KvSavings:
    columns = [[getattr(usage, name) for usage in usages] for name in KvSavings._fields]
    return KvSavings(*map(sum, columns))._replace(worst=max(columns[KvSavings._fields.index("worst")]))
