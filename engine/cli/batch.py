"""The work on many photos: the next one is decoded and the last one encoded while the networks run."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from engine.cli.captions import Caption, Captioner, ask_ahead, asked_of, caption_picture
from engine.cli.claims import Claim, claim_photo, wait_for_photo
from engine.cli.faces import FacePass
from engine.cli.jobs import JobSource, ListedJobs, PhotoJob, file_stamp, is_made
from engine.errors import OutOfMemoryError, RestoreError, UnexpectedError, from_os_error
from engine.image.files import check_output, read_photo, write_photo
from engine.image.photo import Photo
from engine.image.preprocess import result_size
from engine.image.preview import preview
from engine.memory.host_memory import peak_memory_bytes
from engine.memory.size_plan import SizePlan
from engine.pipeline.executor import OnEstimate, OnStage, ignore
from engine.pipeline.faces import told
from engine.pipeline.plan import RestorationPlan
from engine.pipeline.provenance import provenance_of
from engine.pipeline.restorer import Restored, Restorer
from engine.settings import Settings

#: A photo, and what ends the wait for another run that has it; None does not wait.
_Turn = tuple[PhotoJob, threading.Event | None]


class ProgressListener(Protocol):
    """Who is told how the work goes; always from the thread that asks for the outcomes."""

    def begin(self, job: PhotoJob) -> None:
        """Hear that the networks turn to a photo."""

    def step(self) -> None:
        """Hear that a sampling step is done."""

    def part(self, stage: str, done: int, total: int) -> None:
        """Hear how many tiles of a step, or of another stage, are done."""

    def note(self, text: str, *, detail: bool = False) -> None:
        """Hear something about a photo that its owner must know, or, as a detail, may want to."""


@dataclass(frozen=True)
class Outcome:
    """What became of a photo.

    Attributes:
        job: as it was given.
        reports: of each result that was made: its settings, times and sizes, as plain data.
        error: why there are not all of them.
        before, after: the photo and its first result as small WebPs, if they were asked for.
    """

    job: PhotoJob
    reports: tuple[dict[str, Any], ...] = ()
    error: RestoreError | None = None
    before: bytes | None = None
    after: bytes | None = None


@dataclass(frozen=True)
class Source:
    """A photo as it was taken on.

    Attributes:
        job: what is left to be made of it.
        photo: as it was read; None if nothing is to be done about it.
        stamp: its file's, from before it was read.
        claim: that keeps other runs off it; None where nothing is made, or whatever is there is replaced.
    """

    job: PhotoJob
    photo: Photo | None = None
    stamp: dict[str, int] | None = None
    claim: Claim | None = None


@dataclass(frozen=True)
class BatchRunner:
    """How photos are restored.

    Attributes:
        restorer: that does it.
        settings: of all of them, but for the seed.
        overwrite: whether results that are there are replaced.
        previews: longer side in pixels of the small pictures that outcomes come with; 0 for none.
        like: metadata of a result whose tiles are taken again for photos of its size.
        quality: of JPEGs, WebPs and AVIFs, None for each format's own.
        any_size: whether photos are read whatever their size, instead of as the computer's memory allows.
        on_estimate, on_stage: as for `Restorer.restore`.
        captioner: who says what each photo shows; None asks nobody.
        faces: what restores the faces of each photo once more; None leaves them.
        preset: whose settings they are, for the metadata; None for the bundle's own.
    """

    restorer: Restorer
    settings: Settings
    overwrite: bool = False
    previews: int = 0
    like: dict[str, Any] | None = None
    quality: int | None = None
    any_size: bool = False
    on_estimate: OnEstimate | None = None
    on_stage: OnStage = ignore
    captioner: Captioner | None = None
    faces: FacePass | None = None
    preset: str | None = None

    def take(self, job: PhotoJob, stop: threading.Event | None = None) -> Source | None:
        """Take a photo on: claim it, see what of it another run has made by now, and read it.

        Args:
            job: of the photo.
            stop: ends the wait for another run that has the photo; None does not wait.
        Returns:
            The photo, or None while another run has it.
        """
        if job.error is not None or not (job.outputs or self.previews):
            return Source(job)
        claim: Claim | None = None
        made: list[Path] = []
        if job.outputs and not self.overwrite:
            folder = job.outputs[0][1].parent
            made = _make_folder(folder)
            claim = claim_photo(job.photo, folder) if stop is None else wait_for_photo(job.photo, folder, stop)
            if claim is None:
                return None
        try:
            left = self.remaining(job)
            if not (left.outputs or self.previews):
                return Source(left, claim=claim)
            stamp = file_stamp(job.photo) if job.photo.is_file() else None  # else reading says what is wrong
            return Source(left, self.read(left), stamp, claim)
        except BaseException:
            if claim is not None:
                claim.release()
            for empty in made:  # no photo, no folder; others' results in it keep it
                with contextlib.suppress(OSError):
                    empty.rmdir()
            raise

    def read(self, job: PhotoJob) -> Photo:
        """Read a photo."""
        return read_photo(job.photo, max_pixels=None if self.any_size else self.restorer.max_photo_pixels)

    def restore(self, photo: Photo, plan: RestorationPlan, seed: int, watch: ProgressListener) -> Restored:
        """Restore a photo as planned, from a seed's noise."""
        return self.restorer.restore(
            photo,
            plan=plan,
            seed=seed,
            on_step=lambda _: watch.step(),
            on_tile=watch.part,
            on_note=lambda text: watch.note(f"note: {text}"),
            on_estimate=self.on_estimate,
            on_stage=self.on_stage,
        )

    def ask(self, job: PhotoJob, source: Future[Source | None]) -> Future[Caption] | None:
        """Begin to ask what a photo shows, if anybody is asked; for those who look, its stage 1 is made first.

        Args:
            job: of the photo.
            source: the photo, as soon as it is read.
        """
        if self.captioner is None or job.error is not None or not job.outputs:
            return None
        picture = None
        if self.captioner.looks:
            try:
                taken = source.result()
                if taken is None or taken.photo is None:  # another run has it, or had it
                    return None
                picture = caption_picture(self.restorer, taken.photo)
            except Exception:  # which the restoration meets again, and tells
                return None
        return ask_ahead(self.captioner, job.photo, picture)

    def write(self, job: PhotoJob, output: Path, result: Restored) -> None:
        """Write a result, unless it is there: claims keep runs apart, but not on every disk."""
        if not self.overwrite and self._is_made(job, result.settings.seed, output):
            return
        write_photo(output, result.photo, result.provenance, overwrite=self.overwrite, quality=self.quality)

    def remaining(self, job: PhotoJob) -> PhotoJob:
        """Return a job without what was made since it was planned: by a worker that was lost, or another run."""
        if self.overwrite:
            return job
        made = [(seed, output) for seed, output in job.outputs if self._is_made(job, seed, output)]
        outputs = tuple(item for item in job.outputs if item not in made)
        return PhotoJob(job.photo, outputs, (*job.done, *(output for _, output in made)), job.error)

    def _is_made(self, job: PhotoJob, seed: int, output: Path) -> bool:
        provenance = provenance_of(self.restorer.bundle, self.settings.updated({"seed": seed}))
        provenance |= asked_of(self.captioner) | ({} if self.faces is None else self.faces.asked)
        return is_made(output, job.photo, provenance)


def restore_all(jobs: Sequence[PhotoJob] | JobSource, work: BatchRunner, watch: ProgressListener) -> Iterator[Outcome]:
    """Restore photos one after the other, and yield what became of each.

    One photo is decoded ahead and one result encoded behind, in threads of their own, so memory holds three
    photos at most. What the next photo shows is asked while the networks restore the present one. What goes wrong
    with one is part of its outcome and does not touch the others. Photos that another run has claimed come last: by
    then that run has made them, or is waited for, or was killed.

    Args:
        jobs: what to restore into which files.
        work: how.
        watch: is told how it goes.
    """
    stop = threading.Event()
    given = jobs if isinstance(jobs, JobSource) else ListedJobs(deque(jobs))
    of_others: deque[PhotoJob] = deque()

    def following(*, wait: bool) -> _Turn | None:
        """Return the next photo: one of another run, which is waited for, where there is no other."""
        if (job := given.next(wait=wait and not of_others)) is not None:
            return job, None
        return (of_others.popleft(), stop) if of_others else None

    with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(2, "writer") as writer:
        source: Future[Source | None] | None = None
        ahead: Future[Source | None] | None = None
        caption_ahead: Future[Caption] | None = None
        current: _Open | None = None
        behind: _Open | None = None
        turn: _Turn | None = None
        try:
            while True:
                turn = turn or following(wait=False)
                if turn is None:
                    if behind is not None:
                        yield behind.outcome(watch)
                        behind = None
                    if (turn := following(wait=True)) is None:
                        break
                job, waited = turn
                source = ahead or reader.submit(work.take, job, waited)
                caption, caption_ahead = caption_ahead, None
                turn = following(wait=False)
                ahead = None if turn is None else reader.submit(work.take, *turn)
                if source.exception() is None and source.result() is None:
                    of_others.append(job)
                    continue
                caption = caption or work.ask(job, source)
                # Not of a photo that another run has: to look at it is to wait for that run.
                if ahead is not None and turn is not None and turn[1] is None:
                    caption_ahead = work.ask(turn[0], ahead)
                current = _Open(job, caption)
                try:
                    _restore_one(current, source, work, watch, writer, behind)
                except Exception as error:
                    current.error = _restore_error(error, job, watch)
                finally:
                    _release(source, current.writes, writer)
                if behind is not None:
                    yield behind.outcome(watch)
                behind = current
        finally:
            stop.set()
            for taken in (source, ahead):
                if taken is not None:
                    _release(taken, [] if current is None else current.writes, writer)


def _release(source: Future[Source | None], writes: list[Future[None]], writer: ThreadPoolExecutor) -> None:
    """Release a photo's claim as soon as its results are written, which were submitted to the writer before."""

    def release() -> None:
        wait(writes)
        if source.exception() is None and (taken := source.result()) is not None and taken.claim is not None:
            taken.claim.release()

    writer.submit(release)


@dataclass
class _Open:
    """A photo whose results may still be being written."""

    job: PhotoJob
    caption: Future[Caption] | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    writes: list[Future[None]] = field(default_factory=list)
    pictures: list[Future[bytes]] = field(default_factory=list)
    error: RestoreError | None = None

    def wait(self) -> None:
        """Wait until everything is written, whatever came of it."""
        pending: list[Future[Any]] = [*self.writes, *self.pictures]
        wait(pending)

    def outcome(self, watch: ProgressListener) -> Outcome:
        """Wait until everything is written, and return what became of the photo."""
        written = []
        for report, write in zip(self.reports, self.writes, strict=True):
            if (error := write.exception()) is None:
                written.append({**report, "peak_memory_bytes": peak_memory_bytes()})
            else:
                self.error = self.error or _restore_error(error, self.job, watch)
        failed = [error for picture in self.pictures if (error := picture.exception()) is not None]
        if failed and self.error is None:
            self.error = _restore_error(failed[0], self.job, watch)
        pictures = [picture.result() for picture in self.pictures] if not failed and self.error is None else []
        before, after = pictures if len(pictures) == 2 else (None, None)
        return Outcome(self.job, tuple(written), self.error, before, after)


def _restore_one(
    current: _Open,
    source: Future[Source | None],
    work: BatchRunner,
    watch: ProgressListener,
    writer: ThreadPoolExecutor,
    behind: _Open | None,
) -> None:
    if current.job.error is not None:
        raise current.job.error
    if current.job.outputs:
        watch.begin(current.job)
    taken = source.result()
    assert taken is not None
    # Again: without a claim, another run may have made it while it was read ahead.
    current.job = job = work.remaining(taken.job)
    photo = taken.photo
    if photo is None:
        return
    if not job.outputs:
        if work.previews:
            done = writer.submit(_preview_of_file, job.done[0], work.previews)
            current.pictures = [writer.submit(preview, photo, work.previews), done]
        return
    for warning in photo.warnings:
        watch.note(f"note: {job.photo}: {warning}")
    left: tuple[str, ...] = ()
    for _, output in job.outputs:
        _make_folder(output.parent)
        size = result_size(photo.size, work.settings.upscale)
        left = check_output(output, photo, overwrite=work.overwrite, size=size)
    for warning in left:
        watch.note(f"note: {job.photo}: {warning}")
    caption = None if current.caption is None else current.caption.result()
    settings = work.settings
    if caption is not None:
        settings = settings.updated({"prompt": caption.joined(settings.prompt)})
        if caption.problem is not None:
            watch.note(f"note: {job.photo}: {caption.problem}")
        else:
            watch.note(f"{job.photo}: caption: {caption.text}", detail=True)
    plan = work.restorer.plan(photo.size, settings, like=work.like)
    if plan.size_plan != SizePlan() or plan.memory is not None:
        watch.note(f"{job.photo}: {plan}", detail=True)
    if work.previews:
        current.pictures = [writer.submit(preview, photo, work.previews)]
    found = None if work.faces is None else work.faces.find(photo, plan.size)
    for seed, output in job.outputs:
        result = work.restore(photo, plan, seed, watch)
        if work.faces is not None and found is not None:
            result = work.faces.restore(photo, result, found, watch.part, on_stage=work.on_stage)
            watch.note(f"{job.photo}: {told(result.provenance['faces'])}", detail=True)
        made_with: dict[str, Any] = {"photo": taken.stamp}
        if caption is not None:
            made_with["caption"] = caption.as_data(work.settings.prompt)
        if work.preset is not None:
            made_with["preset"] = work.preset
        result = replace(result, provenance={**result.provenance, **made_with})
        if behind is not None:
            behind.wait()
        current.wait()
        current.reports.append(_report(job.photo, output, photo, result))
        current.writes.append(writer.submit(work.write, job, output, result))
        if len(current.pictures) == 1:
            current.pictures.append(writer.submit(preview, result.photo, work.previews))


def _report(source: Path, output: Path, photo: Photo, result: Restored) -> dict[str, Any]:
    return {
        "input": str(source),
        "input_size": photo.size,
        "output": str(output),
        "output_size": result.photo.size,
        **result.provenance,
        "graphs_ms": _rounded(result.timings.graphs_ms),
        "outside_ms": _rounded(result.timings.outside_ms),
        "device_ms": _rounded(result.timings.device_ms),
        "total_ms": round(result.timings.total_ms, 1),
    }


def _rounded(stages_ms: dict[str, float]) -> dict[str, float]:
    return {stage: round(value, 1) for stage, value in stages_ms.items()}


def _preview_of_file(path: Path, side: int) -> bytes:
    return preview(read_photo(path), side)


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the new ones, the lowest first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, folder, "create the folder") from error
    return missing


def _restore_error(error: BaseException, job: PhotoJob, watch: ProgressListener) -> RestoreError:
    """Return any error as one of a photo; a bug comes with its traceback as a note, and does not stop the others."""
    if isinstance(error, RestoreError):
        return error if str(job.photo) in str(error) else error.at(job.photo)
    if isinstance(error, MemoryError):
        fix = "close other programs, or restore at a smaller size"
        return OutOfMemoryError("out of memory", where=job.photo, fix=fix)
    if isinstance(error, OSError):
        return from_os_error(error, job.photo, "read or write", "either")
    watch.note("".join(traceback.format_exception(error)))
    fix = "report the lines above and the command"
    return UnexpectedError("this is a bug", where=job.photo, found=f"{type(error).__name__}: {error}", fix=fix)
