"""What processes that restore photos beside each other are made from, and what they tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine.cli.batch import BatchRunner, Outcome, ProgressListener
from engine.cli.captions import Captioner
from engine.cli.faces import FacePass, FaceRequest
from engine.cli.jobs import PhotoJob
from engine.pipeline.restorer import Restorer
from engine.settings import Settings


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is made from.

    Attributes:
        engine: what `Restorer.open` is called with.
        settings, overwrite, previews, like, quality, any_size, captioner, preset: as `engine.cli.batch.BatchRunner` has
            them.
        faces: how faces are restored, which the worker makes its pass from; None leaves them.
    """

    engine: dict[str, Any]
    settings: Settings
    overwrite: bool = False
    previews: int = 0
    like: dict[str, Any] | None = None
    quality: int | None = None
    any_size: bool = False
    captioner: Captioner | None = None
    faces: FaceRequest | None = None
    preset: str | None = None

    @contextmanager
    def open(self) -> Iterator[BatchRunner]:
        """Open the bundle, and return what restores photos with it.

        Raises:
            As `Restorer.open` and `FacePass.open`.
        """
        with ExitStack() as opened:
            restorer = opened.enter_context(Restorer.open(**self.engine))
            faces = None
            if self.faces is not None:
                faces = FacePass.open(restorer, self.faces, self.engine)
                opened.enter_context(faces.restorer)
            options = (self.overwrite, self.previews, self.like, self.quality, self.any_size)
            named: dict[str, Any] = {"captioner": self.captioner, "preset": self.preset}
            yield BatchRunner(restorer, self.settings, *options, **named, faces=faces)

    def is_work(self, job: PhotoJob) -> bool:
        """Tell whether a worker has anything to do for a photo."""
        return job.error is None and (bool(job.outputs) or self.previews > 0)


@dataclass
class Notes:
    """A `engine.cli.batch.ProgressListener` that keeps what is said about photos until it is told elsewhere."""

    texts: list[tuple[str, bool]] = field(default_factory=list)

    def begin(self, job: PhotoJob) -> None:
        pass

    def step(self) -> None:
        pass

    def part(self, stage: str, done: int, total: int) -> None:
        pass

    def note(self, text: str, *, detail: bool = False) -> None:
        self.texts.append((text, detail))

    def take(self) -> list[tuple[str, bool]]:
        """Return what was said since the last time."""
        texts, self.texts = self.texts, []
        return texts


def replay(
    notes: list[tuple[str, bool]], outcome: Outcome, job: PhotoJob, steps: int, watch: ProgressListener
) -> Outcome:
    """Tell a listener of a photo that was restored elsewhere: all of its steps, and what was said."""
    if job.outputs:
        watch.begin(job)
        for _ in range(steps * len(outcome.reports)):
            watch.step()
    for text, detail in notes:
        watch.note(text, detail=detail)
    return outcome
