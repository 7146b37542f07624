"""The count of a run: photos that were restored, that had a result, and that failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.cli.batch import Outcome
from engine.errors import RestoreError
from engine.units import format_duration


@dataclass
class RunSummary:
    """Counts of a run, from its start.

    Attributes:
        restored: photos that got all their results.
        kept: photos that had all of them before.
        failed: photos that did not get all of them, and why.
    """

    restored: int = 0
    kept: int = 0
    failed: list[tuple[str, RestoreError]] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def add(self, outcome: Outcome) -> None:
        """Count a photo."""
        if outcome.error is not None:
            self.failed.append((str(outcome.job.photo), outcome.error))
        elif outcome.reports:
            self.restored += 1
        else:
            self.kept += 1

    @property
    def photos(self) -> int:
        return self.restored + self.kept + len(self.failed)

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return time.monotonic() - self._started

    def summary(self) -> str:
        """Return one line about the run."""
        parts = [f"{self.restored} restored"]
        parts += [f"{self.kept} had a result already"] if self.kept else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        pace = f", {self.seconds / self.restored:.3g} s a photo" if self.restored else ""
        took = format_duration(self.seconds)
        return f"{self.photos} photo{'s' * (self.photos != 1)}: {', '.join(parts)}, in {took}{pace}"

    def lines(self) -> Iterator[str]:
        """Yield the report: the summary, and a line for each photo that failed."""
        yield self.summary()
        for photo, error in self.failed:
            yield f"  failed: {photo}: {reason(error)}"


def reason(error: RestoreError) -> str:
    """Return why a photo failed in one line, without its name."""
    return error.problem + (f" ({error.found})" if error.found else "")
