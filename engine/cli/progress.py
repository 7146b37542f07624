"""A bar over the steps of many photos."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from engine.cli.jobs import PhotoJob
from engine.errors import printable


class StepBar:
    """A `engine.cli.batch.ProgressListener` that draws: which photo of how many, and all their steps.

    Args:
        jobs: that are to come.
        steps: of one result.
        quiet: draw nothing, and leave details out.
    """

    def __init__(self, jobs: Sequence[PhotoJob], steps: int, *, quiet: bool) -> None:
        self._jobs = sum(bool(job.outputs) for job in jobs)
        self._begun = 0
        self._steps, self._quiet = steps, quiet
        self._owed = 0
        total = steps * sum(len(job.outputs) for job in jobs)
        self._bar = tqdm(total=total, unit="step", disable=quiet or not total, file=sys.stderr)

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._settle()
        self._bar.close()

    def begin(self, job: PhotoJob) -> None:
        self._settle()
        self._begun += 1
        self._owed = self._steps * len(job.outputs)
        count = f"[{self._begun}/{self._jobs}] " if self._jobs > 1 else ""
        self._bar.set_description_str(printable(f"{count}{job.photo.name}"))

    def step(self) -> None:
        self._owed -= 1
        self._bar.update()

    def part(self, stage: str, done: int, total: int) -> None:
        self._bar.set_postfix_str(f"{stage} {done}/{total}" if done < total else "")

    def note(self, text: str, *, detail: bool = False) -> None:
        if not (detail and self._quiet):
            self._bar.write(printable(text), file=sys.stderr)

    def drop(self) -> None:
        """Leave nothing of the bar behind: half a bar says nothing beside an error."""
        self._bar.leave = False

    def _settle(self) -> None:
        """Take steps that will not come off the total: those of a photo that failed."""
        if self._owed and self._bar.total is not None:
            self._bar.total -= self._owed
            self._bar.refresh()
        self._owed = 0
