"""The desk: everybody's photos go through one restorer, in turns, a photo at a time.

A person with two hundred photos does not hold up a person with one. A photo is restored by the code of the command
line (`engine.cli.batch`), so the result is the command line's.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from engine.cli.batch import BatchRunner, Outcome, restore_all
from engine.cli.faces import FacePass, FaceRequest
from engine.cli.jobs import PhotoJob
from engine.errors import RestoreError, UnexpectedError, UsageError
from engine.image.photo import Pixels
from engine.pipeline.faces import FaceRestorer
from engine.pipeline.restorer import Restorer
from engine.settings import FaceSettings, Settings

#: Longer side in pixels of the pictures that are compared on the page: sharp on a large screen.
COMPARED_PX = 1600
_CANCELLED = "cancelled"
T = TypeVar("T")


class CancellationError(RestoreError):
    """Nobody waits for this restoration any more."""


@dataclass(frozen=True)
class Progress:
    """How far a photo is.

    Attributes:
        ahead: photos that come before it.
        begun: whether the networks turned to it.
        stage: the operation of the recipe that runs now, as "denoise encoder".
        done, steps: sampling steps.
        part: what runs in parts now, and how far it is, as "vae decoder 3/8"; empty if nothing does.
        seconds_left: an estimate; None if there is nothing to tell it from.
        picture: f32[h, w, 3] in [0, 1], a small picture of what the result will be, or None.
    """

    ahead: int = 0
    begun: bool = False
    stage: str = ""
    done: int = 0
    steps: int = 0
    part: str = ""
    seconds_left: float | None = None
    picture: Pixels | None = None


@dataclass(eq=False)
class Ticket:
    """A photo that is to be restored.

    Attributes:
        owner: whose it is; owners take turns.
        photo: its file.
        output: where the result goes.
        settings: of the restoration.
        faces: how faces are restored; None if they are not.
        preset: whose settings they are; None for the bundle's own.
        on_change: called, from any thread, whenever `progress` or `outcome` is another.
        progress: how far it is.
        notes: what its owner must know, a sentence each.
        outcome: what became of it; None as long as it is waited for.
    """

    owner: str
    photo: Path
    output: Path
    settings: Settings
    on_change: Callable[[], None]
    progress: Progress = Progress()
    notes: list[str] = field(default_factory=list)
    outcome: Outcome | None = None
    faces: FaceSettings | None = None
    preset: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def change(self, **values: object) -> None:
        """Note how far the photo is, and tell."""
        self.progress = replace(self.progress, **values)  # type: ignore[arg-type]
        self.on_change()

    def finish(self, outcome: Outcome) -> None:
        """Note what became of the photo, and tell."""
        self.outcome = outcome
        self.on_change()


class Desk:
    """Takes tickets and works on them, one at a time, in a thread of its own.

    Args:
        restorer: that does the work.
        limit: tickets of all owners that may wait.
        faces: that restores faces; None where no ticket asks for it.
    """

    def __init__(self, restorer: Restorer, limit: int, faces: FaceRestorer | None = None) -> None:
        self._restorer, self._limit, self._faces = restorer, limit, faces
        self._changed = threading.Condition()
        #: Each owner's tickets; the first owner's first ticket is next, and then the owner goes to the end.
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()
        #: What is to be done between two photos.
        self._calls: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._current: Ticket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    def submit(self, tickets: list[Ticket]) -> None:
        """Take tickets of one owner, all or none.

        Raises:
            UsageError: too many are waiting.
        """
        with self._changed:
            waiting = sum(map(len, self._waiting.values()))
            if waiting + len(tickets) > self._limit:
                raise UsageError(
                    "too many photos are waiting",
                    expected=f"{self._limit} at most",
                    found=f"{waiting} waiting, {len(tickets)} more",
                    fix="restore fewer at once, or try again later",
                )
            for ticket in tickets:
                ticket.progress = Progress(steps=ticket.settings.steps)
                self._waiting.setdefault(ticket.owner, deque()).append(ticket)
            self._changed.notify()
        self._tell_places()

    def call(self, work: Callable[[Restorer], T]) -> Future[T]:
        """Have something short done with the restorer, before the next photo."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work(self._restorer))
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            self._calls.append((run, future))
            self._changed.notify()
        return future

    def cancel(self, owner: str) -> None:
        """Take an owner's tickets back; the one that is worked on ends after its present step."""
        with self._changed:
            dropped = list(self._waiting.pop(owner, ()))
            if self._current is not None and self._current.owner == owner:
                self._current.cancelled.set()
        for ticket in dropped:
            ticket.cancelled.set()
            ticket.finish(Outcome(PhotoJob(ticket.photo, ()), error=CancellationError(_CANCELLED)))
        self._tell_places()

    def close(self) -> None:
        """Take no more, and wait until the step that runs is over."""
        with self._changed:
            self._closed = True
            owners = [*self._waiting, *([self._current.owner] if self._current is not None else ())]
            self._changed.notify()
        for owner in owners:
            self.cancel(owner)
        self._thread.join()

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            try:
                outcome = self._restore(ticket)
            except Exception as error:  # else a bug would leave everybody waiting
                traceback.print_exception(error)
                bug = UnexpectedError("this is a bug", found=f"{type(error).__name__}: {error}")
                outcome = Outcome(PhotoJob(ticket.photo, ()), error=bug)
            with self._changed:
                self._current = None
            ticket.finish(outcome)

    def _next(self) -> Ticket | None:
        """Return the ticket whose turn it is, None at the end; what was called for is done first."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._calls)
                if self._closed:
                    for _, future in self._calls:
                        future.cancel()
                    return None
                if not self._calls:
                    owner, tickets = self._waiting.popitem(last=False)
                    self._current = tickets.popleft()
                    if tickets:
                        self._waiting[owner] = tickets
                    break
                call, _ = self._calls.popleft()
            call()
        self._tell_places()
        return self._current

    def _tell_places(self) -> None:
        """Tell every ticket that waits how many come before it."""
        with self._changed:
            queues = [list(tickets) for tickets in self._waiting.values()]
            ahead = int(self._current is not None)
        turns = max(map(len, queues), default=0)
        order = [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)]
        for place, ticket in enumerate(order):
            if ticket.progress.ahead != place + ahead:
                ticket.change(ahead=place + ahead)

    def _restore(self, ticket: Ticket) -> Outcome:
        watch = _Watch(ticket)
        job = PhotoJob(ticket.photo, ((ticket.settings.seed, ticket.output),))
        faces = None
        if ticket.faces is not None:
            assert self._faces is not None, "only pages that have it ask for it"
            faces = FacePass(self._faces, FaceRequest(ticket.faces))
        work = BatchRunner(
            self._restorer,
            ticket.settings,
            overwrite=True,
            previews=COMPARED_PX,
            on_estimate=watch.estimate,
            on_stage=watch.stage,
            faces=faces,
            preset=ticket.preset,
        )
        (outcome,) = restore_all([job], work, watch)
        return outcome


class _Watch:
    """A `engine.cli.batch.ProgressListener` that notes on a ticket how far it is, and ends what was cancelled."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._times: list[float] = []

    def begin(self, job: PhotoJob) -> None:
        self._ticket.change(ahead=0, begun=True)
        self._check()

    def stage(self, name: str) -> None:
        """Hear that an operation of the recipe begins."""
        self._check()
        if name == "steps":  # for the first time, or again where memory ran out
            self._times.clear()
            self._ticket.change(done=0, seconds_left=None)
        self._ticket.change(stage=name)

    def step(self) -> None:
        self._check()
        self._times.append(time.monotonic())
        progress = self._ticket.progress
        pace = [after - before for before, after in zip(self._times, self._times[1:], strict=False)]
        left = None if not pace else median(pace[-8:]) * (progress.steps - progress.done - 1)
        self._ticket.change(done=progress.done + 1, seconds_left=left, part="")

    def part(self, stage: str, done: int, total: int) -> None:
        self._check()
        self._ticket.change(part=f"{stage} {done}/{total}" if done < total else "")

    def note(self, text: str, *, detail: bool = False) -> None:
        if not detail:
            self._ticket.notes.append(text.removeprefix("note: ").removeprefix(f"{self._ticket.photo}: "))

    def estimate(self, pictures: Pixels) -> None:
        """Show what the result will be; f32[1, h, w, 3]."""
        self._ticket.change(picture=pictures[0])

    def _check(self) -> None:
        if self._ticket.cancelled.is_set():
            raise CancellationError(_CANCELLED)
