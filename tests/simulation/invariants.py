"""What must hold in a simulated cluster: while it runs, and once all requests are over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attention_host import AttentionHost
from engine_host import EngineHost

from lamina_workers.attention_worker.attention_worker import AttentionWorker


def books(engine: EngineHost, hosts: Sequence[AttentionHost]) -> Iterator[str]:
    """Books that contradict themselves: of the scheduler, and of each attention worker."""
    checks = [] if engine.engine is None else [engine.control.scheduler.check_integrity]
    checks += [worker.check_integrity for host in hosts for worker in host.workers]
    for check in checks:
        try:
            check()
        except Exception as error:  # noqa: BLE001  # whatever does not agree
            yield f"the books do not agree: {error!r}"


def left_over(engine: EngineHost, hosts: Sequence[AttentionHost], cleared: bool) -> list[str]:
    """What is left of requests that are over: pages of a holder that are neither free nor of a cached prefix, and
    workers that are no holders. `cleared`: there are no cached prefixes.

    An engine does not know which pages the samples of its predecessor share, so it may count too few of what is cached.
    What was closed of spares is still there while its operation waits for a batch.
    """
    if engine.engine is None:
        return ["no engine is up"]
    names, found = engine.engine.holder_names, list(books(engine, hosts))
    by_name = {port.name: hosts[number] for number, port in engine.ports.items()}
    missing = {host.number for host in hosts} - engine.retired
    for number in engine.control.placement.holders:
        workers: Sequence[AttentionWorker] = [engine.local] if number not in names else ()
        if number in names:
            host = by_name.get(names[number])
            if host is None:
                found.append(f"holder {number}, {names[number]}, is no worker any more")
                continue
            missing.discard(host.number)
            workers = host.workers
        evictable = engine.control.scheduler.running.prefix_cache.evictable
        answered = not engine.control.placement.holders[number].outbox
        exact = cleared or not (engine.resumed or engine.control.placement.holders[number].outbox)
        for at, pool in ((at, pool) for worker in workers for at, pool in enumerate(worker.pools)):
            cached = evictable.get((number, at), 0)
            other = pool.n_pages - pool.free_pages - cached
            counted = engine.control.scheduler.ledger.free.get((number, at), 0)
            if answered and counted != pool.free_pages:
                found.append(f"holder {number}: {pool.free_pages} free, the ledger says {counted}")
            if other if exact else other < 0:
                found.append(f"holder {number}: {pool.free_pages} free, {cached} cached of {pool.n_pages} pages")
    ledger, pages = engine.control.scheduler.ledger.unpromised(), engine.control.placement.pages
    if cleared and ledger != pages:
        found.append(f"the ledger has {ledger} of the pages {pages} left")
    if missing:
        found.append(f"workers {sorted(missing)} have not joined again")
    return found
