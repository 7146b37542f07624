"""The work on many photos, by all GPUs of this computer: a process for each, which asks for photo after photo.

A photo is one process's at a time. What a process had in hand when it was lost is given to another one, which first
looks what of it was written; a GPU whose process cannot start is told and left out.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from engine.cli.batch import Outcome, ProgressListener, restore_all
from engine.cli.jobs import PhotoJob
from engine.cli.workers import Notes, WorkerConfig, replay
from engine.errors import BackendError, RestoreError, UnexpectedError

#: What `--device` calls all GPUs of this computer.
ALL_GPUS = "cuda:all"
#: How often a photo is given to a process, and how often a GPU gets a new process, before they are given up.
_TRIES = 2
#: For a process to end when it is told to: a step of a large photo, and a result being written.
_PATIENCE_S = 15.0


def restore_on_gpus(
    jobs: Sequence[PhotoJob], config: WorkerConfig, gpus: int, watch: ProgressListener
) -> Iterator[Outcome]:
    """Restore photos on all GPUs, and yield what became of each as it is done.

    Args:
        jobs: what to restore into which files.
        config: what each process is made from, but for its device.
        gpus: how many there are.
        watch: is told how it goes, a photo at a time.
    Raises:
        RestoreError: no GPU's process could start; the first one's error.
    """
    yield from (Outcome(job, error=job.error) for job in jobs if not config.is_work(job))
    work = [job for job in jobs if config.is_work(job)]
    if not work:
        return
    team = _Team(work, config, watch)
    try:
        for index in range(min(gpus, len(work))):
            team.start(f"cuda:{index}")
        yield from team.outcomes()
    finally:
        team.end()


@dataclass(eq=False)
class _Worker:
    """A process, this end of its line, and the photos that it has in hand."""

    device: str
    process: SpawnProcess
    line: Connection
    in_hand: list[PhotoJob] = field(default_factory=list)
    waits: bool = False


class _Team:
    def __init__(self, jobs: Sequence[PhotoJob], config: WorkerConfig, watch: ProgressListener) -> None:
        self._left, self._config, self._watch = deque(jobs), config, watch
        self._unfinished = len(jobs)
        self._workers: list[_Worker] = []
        self._lost: Counter[Any] = Counter()  # how often a photo's process was lost, and a GPU's
        self._errors: list[RestoreError] = []
        self._has_worked = False

    def start(self, device: str) -> None:
        """Start a GPU's process."""
        context = multiprocessing.get_context("spawn")
        line, other = context.Pipe()
        config = replace(self._config, engine={**self._config.engine, "device": device})
        process = context.Process(target=_work, args=(other, config), name=device, daemon=True)
        with _ignored_interrupts():  # which this process answers for all of them
            process.start()
        other.close()
        self._workers.append(_Worker(device, process, line))

    def outcomes(self) -> Iterator[Outcome]:
        """Hand out photos and yield what became of them, until there is none left."""
        while self._unfinished and self._workers:
            ready = wait([worker.line for worker in self._workers])
            for worker in [worker for worker in self._workers if worker.line in ready]:
                for outcome in self._hear(worker):
                    self._unfinished -= 1
                    yield outcome
            self._hand_out()
        if not self._has_worked and self._errors:
            raise self._errors[0]
        for job in self._left:  # every GPU has failed
            yield Outcome(job, error=self._errors[-1].at(job.photo))

    def end(self) -> None:
        """End all processes: at once those that are idle, others behind their present step."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_PATIENCE_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.line.close()

    def _hear(self, worker: _Worker) -> Iterator[Outcome]:
        try:
            kind, *told = worker.line.recv()
        except (EOFError, OSError):
            worker.process.join()
            yield from self._lose(worker)
            return
        if kind == "wants":
            (worker.waits,) = told
            if not worker.waits:  # it has something to do meanwhile
                self._give(worker)
        elif kind == "failed":
            (error,) = told
            self._errors.append(error)
            self._watch.note(f"error: {worker.device}: {error}")
            self._give_up(worker)
        else:
            notes, outcome = told
            self._has_worked = True
            job = next(job for job in worker.in_hand if job.photo == outcome.job.photo)
            worker.in_hand.remove(job)
            yield replay(notes, outcome, job, self._config.settings.steps, self._watch)

    def _hand_out(self) -> None:
        """Answer those who wait: with a photo, or that there will be none."""
        for worker in [worker for worker in self._workers if worker.waits]:
            if self._left or not any(other.in_hand for other in self._workers):
                worker.waits = False
                self._give(worker)

    def _give(self, worker: _Worker) -> None:
        job = self._left.popleft() if self._left else None
        if job is not None:
            worker.in_hand.append(job)
        try:
            worker.line.send(job)
        except OSError:  # it was lost, which the next look at its line tells
            worker.waits = False

    def _lose(self, worker: _Worker) -> Iterator[Outcome]:
        """Give back what a lost process had in hand, and start another one."""
        status = worker.process.exitcode
        found = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
        error = BackendError("a GPU's process has ended", where=worker.device, found=found)
        self._errors.append(error)
        self._watch.note(f"error: {error}")
        tried_out = []
        for job in worker.in_hand:
            self._lost[job.photo] += 1
            if self._lost[job.photo] >= _TRIES:
                tried_out.append(job)
        worker.in_hand = [job for job in worker.in_hand if job not in tried_out]
        self._give_up(worker)
        self._lost[worker.device] += 1
        if self._lost[worker.device] < _TRIES:
            self.start(worker.device)
        for job in tried_out:
            yield Outcome(job, error=error.at(job.photo))

    def _give_up(self, worker: _Worker) -> None:
        self._left.extendleft(reversed(worker.in_hand))
        self._workers.remove(worker)
        worker.line.close()


class _Handed:
    """The jobs of a process: those that it is handed."""

    def __init__(self, line: Connection) -> None:
        self._line = line

    def next(self, *, wait: bool) -> PhotoJob | None:
        """Return the next photo; see `engine.cli.jobs.JobSource`."""
        self._line.send(("wants", wait))
        job: PhotoJob | None = self._line.recv()
        return job


class _Stoppable(Notes):
    """Notes of a process that may be told to end: at once, or at the next step where a library loses the exception."""

    is_over = False

    def stop(self) -> None:
        """End the process."""
        self.is_over = True
        sys.exit(1)

    def step(self) -> None:
        if self.is_over:
            sys.exit(1)


def _work(line: Connection, config: WorkerConfig) -> None:
    """Be a GPU's process, until there is no photo left or the one that started it is gone."""
    notes = _Stoppable()
    signal.signal(signal.SIGTERM, lambda *_: notes.stop())  # what is open is closed on the way out
    try:
        with config.open() as work:
            # A GPU that the bundle is not for, or that is too small, fails at any photo: it is to take none.
            side = config.settings.min_size
            work.restorer.plan((side, side), config.settings)
            for outcome in restore_all(_Handed(line), work, notes):
                line.send(("outcome", notes.take(), outcome))
    except RestoreError as error:
        line.send(("failed", error))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        line.send(("failed", UnexpectedError("this is a bug", found=f"{type(error).__name__}: {error}")))


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Have a process that is started meanwhile ignore Ctrl-C, which a terminal sends to all of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
