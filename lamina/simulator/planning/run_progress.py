"""One progress over many runs."""

from __future__ import annotations

from lamina.simulator.event_loop.simulate import Progress


class RunProgress:
    """Progress over many runs, which never falls."""

    def __init__(self, progress: Progress | None, runs: int) -> None:
        self._progress, self._runs, self._run, self._most = progress, runs, -1, 0

    def next(self) -> Progress:
        """The progress of the next run."""
        self._run += 1

        def report(what: str, done: int, total: int) -> None:
            at = int(1000 * min(1.0, (self._run + min(1.0, done / max(1, total))) / self._runs))
            if self._progress is not None and self._most < at < 1000:
                self._most = at
                self._progress(what, at, 1000)

        return report

    def end(self) -> None:
        if self._progress is not None:
            self._progress("simulating", 1000, 1000)
