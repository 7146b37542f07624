"""What runs a restoration: what it is given, and who is told how it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.image.photo import Pixels
from engine.pipeline.plan import RestorationPlan
from engine.sampling.noise import noise_source
from engine.sampling.sampler import Latent, StepOutput
from engine.timings import Timings

OnStep = Callable[[StepOutput], None]
#: Told a stage, how many of its tiles are done, and how many there are; for a step, of that step.
OnTile = Callable[[str, int, int], None]
#: Told a line that a person should read while it happens.
OnNote = Callable[[str], None]
#: Told the operation of the recipe that begins; on a GPU, that is put on its stream.
OnStage = Callable[[str], None]
#: Told a small picture of each photo's estimate, f32[B,h,w,3] in [0, 1], a pixel for a cell of the latent.
OnEstimate = Callable[[Pixels], None]


def ignore(*_: object) -> None:
    """Do nothing: what is called where nobody listens."""


@dataclass(frozen=True)
class Listener:
    """Who is told how a restoration goes. An exception from any of them ends it.

    Attributes:
        on_step: called after every sampling step.
        on_tile: called after every tile or slice.
        on_note: called with what did not go as planned.
        on_estimate: called after every step with a small picture; None spares making it.
        on_stage: called when an operation begins.
    """

    on_step: OnStep = ignore
    on_tile: OnTile = ignore
    on_note: OnNote = ignore
    on_estimate: OnEstimate | None = None
    on_stage: OnStage = ignore


@dataclass(frozen=True)
class NoiseInput:
    """The noise of a restoration: each photo's seed, or a starting noise f32[B,C,h,w] of the caller's."""

    seeds: Sequence[int]
    start: Latent | None = None

    def source(self, shape: Sequence[int]) -> Callable[[int], Latent]:
        """Return the field of a draw, f32[B, *shape]."""
        return noise_source(self.seeds, tuple(shape), self.start)


class Executor(Protocol):
    """What runs the operations of the recipe between the photo's pixels and the result's."""

    def run(
        self, plan: RestorationPlan, lq: Pixels, noise: NoiseInput, listener: Listener, times: Timings
    ) -> dict[str, Pixels]:
        """Run a plan's operations but for those on photos.

        Args:
            plan: for as many photos as `lq` has.
            lq: f32[B,3,8h,8w] in [-1, 1].
            noise: of the sampling.
            listener: told how it goes.
            times: that each operation's time is added to.
        Returns:
            `pixels` and, where the plan needs it, `stage1`, f32[B,3,8h,8w] each, on the host.
        Raises:
            BackendError: a graph fails. OutOfMemoryError, MemoryError: memory runs out.
        """
        ...
