"""Faces, restored once more, each at the size that the networks were trained for.

    stage 1 ─ find ─ (the photo is restored) ─ cut squares out ─ restore them in batches ─ fix colours ─ paste

A pass over a photo that is restored: it composes `Restorer`'s stage 1 and `Restorer.restore_batch`, and adds no loop of
its own. A bundle's LoRAs are merged into its weights, so a face LoRA at its full strength is another bundle.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, Protocol

from engine.bundle.manifest import Bundle
from engine.errors import UsageError, close_after, close_all
from engine.image.faces import Box, Face, Paste, square_around
from engine.image.photo import Photo, Pixels, Size, resize
from engine.image.preprocess import PhotoLike, fix_colors, from_network, load_photo, to_network, working_size
from engine.pipeline.executor import OnNote, OnStage, OnTile, ignore
from engine.pipeline.restorer import Restored, Restorer
from engine.sampling.sampler import StepOutput
from engine.settings import FaceSettings
from engine.timings import Timings

#: Below this many pixels along the longer side of its box there is nothing to restore a face from: an eye has three or
#: four, and what networks make of them is another person's.
LEAST_PX = 24
#: A face is restored again if the networks see it at least this much larger than with the photo.
LEAST_GAIN = 1.25
#: Faces of one photo that are read from metadata.
MOST = 1_000
#: Faces that go through the networks together, where memory holds as many. More are no faster on a GPU: a step on four
#: squares fills it.
_MOST_AT_ONCE = 4

#: What became of a face; `Decision` says why.
Done = Literal["restored", "left out", "too small", "large already"]


class Detector(Protocol):
    """Finds faces in pictures.

    Attributes:
        name: for results' metadata.
    """

    name: str

    def find(self, rgb: Pixels) -> list[Face]:
        """Return the faces in a picture f32[H, W, 3] in [0, 1], in its pixels."""
        ...


@dataclass(frozen=True)
class FoundFaces:
    """The faces of a photo, in the order of their numbers, which begin at 1.

    Attributes:
        size: (width, height) in pixels of the photo.
        faces: with boxes in the photo's pixels.
        took_ms: to find them.
    """

    size: Size
    faces: tuple[Face, ...]
    took_ms: float = 0.0

    def as_data(self) -> dict[str, Any]:
        """Return them as plain data, for the metadata of the result."""
        return {
            "size_px": list(self.size),
            "found": [{"box_px": face.box.as_data(), "confidence": face.confidence} for face in self.faces],
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], size: Size) -> FoundFaces | None:
        """Return what `as_data` wrote; None where it is of a photo of another size, or no such data."""
        if data.get("size_px") != list(size) or not isinstance(data.get("found"), list) or len(data["found"]) > MOST:
            return None
        faces = []
        for found in data["found"]:
            box, confidence = (
                found.get(name) if isinstance(found, dict) else None for name in ("box_px", "confidence")
            )
            if not isinstance(box, list) or [type(side) for side in box] != [int] * 4:
                return None
            if box[0] >= box[2] or box[1] >= box[3] or not isinstance(confidence, (int, float)):
                return None
            faces.append(Face(Box(*box).within(size), float(confidence)))
        return cls(size, tuple(faces))


@dataclass(frozen=True)
class Decision:
    """What is done about a face.

    Attributes:
        number: of the face, from 1.
        face: as it was found.
        square: that is cut out around it, in the photo's pixels.
        done: what becomes of it.
    """

    number: int
    face: Face
    square: Box
    done: Done


class FaceRestorer:
    """Restores the faces of photos that a restorer restores.

    Args:
        restorer: of the photos; it stays the caller's to close.
        detector: that finds the faces.
        with_bundle: a restorer of another bundle, for the faces alone; this class closes it. None restores them with
            the photos' own.
    """

    def __init__(self, restorer: Restorer, detector: Detector, with_bundle: Restorer | None = None) -> None:
        self._photos, self._detector = restorer, detector
        self._faces = restorer if with_bundle is None else with_bundle

    @classmethod
    def open(
        cls, restorer: Restorer, bundle: str | PathLike[str] | None = None, *, threads: int = 0, **engine: Any
    ) -> FaceRestorer:
        """Open the detector and, if one is named, the bundle for faces.

        Args:
            restorer: of the photos.
            bundle: folder of a bundle that restores faces, such as one with a face LoRA at full strength.
            threads: of the CPU; 0 is one per core.
            **engine: how the bundle is opened, as for `Restorer.open`.
        Raises:
            BackendError: the detector's package is missing; or as `Restorer.open`.
            BundleError: as `Restorer.open`.
        """
        from engine.backends.face_detector import FaceDetector

        detector = FaceDetector(threads)
        return cls(restorer, detector, None if bundle is None else Restorer.open(bundle, threads=threads, **engine))

    def __enter__(self) -> FaceRestorer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        close_after(error, self.close)

    def close(self) -> None:
        """Close the bundle for faces, if there is one."""
        close_all(*(() if self._faces is self._photos else (self._faces.close,)))

    @property
    def bundle(self) -> Bundle:
        """The bundle that restores faces."""
        return self._faces.bundle

    @property
    def side_px(self) -> int:
        """Side of the square at which the networks see a face: the bundle's own size."""
        bundle = self.bundle
        return working_size((1, 1), bundle.manifest.defaults.min_size, bundle.size_multiple)[0]

    def find(self, photo: PhotoLike) -> FoundFaces:
        """Find the faces of a photo, on its stage 1.

        Args:
            photo: as for `Restorer.restore`.
        Raises:
            As `Restorer.stage1`.
        """
        started = time.perf_counter()
        source = load_photo(photo, max_pixels=self._photos.max_photo_pixels)
        stage1 = self._photos.stage1(source)
        faces = tuple(
            replace(face, box=face.box.scaled(stage1.size, source.size)) for face in self._detector.find(stage1.rgb)
        )
        return FoundFaces(source.size, faces, (time.perf_counter() - started) * 1e3)

    def decide(self, found: FoundFaces, networks_px: Size, settings: FaceSettings) -> list[Decision]:
        """Return what is done about each face.

        Args:
            found: the photo's faces.
            networks_px: (width, height) at which the networks see the photo, from `Restorer.working_size`.
            settings: which faces are left out.
        Raises:
            UsageError: one is to be left out that is not there.
        """
        unknown = sorted(set(settings.leave) - set(range(1, len(found.faces) + 1)))
        if unknown:
            raise UsageError(
                "there is no face of that number to leave out",
                expected=f"1 to {len(found.faces)}" if found.faces else "none: no faces were found",
                found=", ".join(map(str, unknown)),
            )
        seen = math.sqrt(math.prod(networks_px) / math.prod(found.size))  # sides are rounded, each by itself
        decisions = []
        for number, face in enumerate(found.faces, start=1):
            square = square_around(face.box, found.size)
            done: Done = "restored"
            if number in settings.leave:
                done = "left out"
            elif max(face.box.width, face.box.height) < LEAST_PX:
                done = "too small"
            elif self.side_px / square.width < LEAST_GAIN * seen:
                done = "large already"
            decisions.append(Decision(number, face, square, done))
        return decisions

    def restore(
        self,
        photo: PhotoLike,
        restored: Restored,
        found: FoundFaces | None = None,
        settings: FaceSettings | None = None,
        *,
        on_tile: OnTile = ignore,
        on_note: OnNote = ignore,
        on_stage: OnStage = ignore,
    ) -> Restored:
        """Restore the faces of a restored photo.

        Every face starts from the noise of the result's seed, so that leaving one out changes no other.

        Args:
            photo: as it was given to the restorer.
            restored: what the restorer made of it; it is not changed.
            found: from `find`; None finds them.
            settings: None means the defaults.
            on_tile: told "face step", how many steps over all faces are done, and how many there are; an exception
                ends it.
            on_note: called with what did not go as planned, a sentence each.
            on_stage: called with "faces" when it begins.
        Returns:
            The result with its faces, and `faces` in its provenance. Where none is restored, the same pixels.
        Raises:
            UsageError: a face is to be left out that is not there.
            BackendError: as `Restorer.restore`.
        """
        settings = settings or FaceSettings()
        source = load_photo(photo, max_pixels=self._photos.max_photo_pixels)
        found = found or self.find(source)
        networks_px = self._photos.working_size(source.size, restored.settings)
        decisions = self.decide(found, networks_px, settings)
        chosen = [decision for decision in decisions if decision.done == "restored"]
        times = _copied(restored.timings)
        times.outside_ms["find faces"] = found.took_ms
        notes = list(restored.notes)

        def keep_note(note: str) -> None:
            notes.append(note)
            on_note(note)

        pixels = restored.photo.rgb
        if chosen:
            on_stage("faces")
            started, before_ms = time.perf_counter(), sum(times.graphs_ms.values())
            squares = self._restored_squares(source, restored, chosen, settings, on_tile, keep_note, times)
            pixels = _pasted(source.size, restored, chosen, squares)
            inside_ms = sum(times.graphs_ms.values()) - before_ms
            times.outside_ms["faces"] = (time.perf_counter() - started) * 1e3 - inside_ms
        provenance = {**restored.provenance, "faces": self.provenance(settings, found, decisions)}
        if notes:
            provenance["notes"] = notes
        return Restored(replace(restored.photo, rgb=pixels), restored.settings, times, provenance, tuple(notes))

    def asked(self, settings: FaceSettings) -> dict[str, Any]:
        """Return what a result's metadata says of faces before any is found."""
        return asked_of(settings, None if self._faces is self._photos else self.bundle)

    def provenance(self, settings: FaceSettings, found: FoundFaces, decisions: Sequence[Decision]) -> dict[str, Any]:
        """Return what a result's metadata keeps of its faces, as plain data."""
        data = found.as_data()
        for entry, decision in zip(data["found"], decisions, strict=True):
            entry.update(number=decision.number, done=decision.done, square_px=decision.square.as_data())
        return {**self.asked(settings), "detector": self._detector.name, "side_px": self.side_px, **data}

    # -- the pass ---------------------------------------------------------------------------------

    def _restored_squares(
        self,
        source: Photo,
        restored: Restored,
        chosen: Sequence[Decision],
        settings: FaceSettings,
        on_tile: OnTile,
        on_note: OnNote,
        times: Timings,
    ) -> Iterator[Pixels]:
        """Yield each face's restored square, f32[side, side, 3] in [0, 1]; memory holds one batch."""
        size = (self.side_px, self.side_px)
        changes = {"prompt": settings.words, "upscale": 1.0, "min_size": self.side_px}
        asked = restored.settings.updated(changes)
        with ExitStack() as stack:
            if self._faces is not self._photos:
                # Both bundles' networks need not fit: the photos' are opened again for the next photo.
                self._photos.release()
                stack.callback(self._faces.release)
            at_once = self._faces.photos_at_once(size, asked, min(len(chosen), _MOST_AT_ONCE))
            batches = [chosen[first : first + at_once] for first in range(0, len(chosen), at_once)]
            done, total = 0, asked.steps * len(batches)

            def on_step(_: StepOutput) -> None:
                nonlocal done
                done += 1
                on_tile("face step", done, total)

            for batch in batches:
                photos = [Photo(resize(decision.square.of(source.rgb), size)) for decision in batch]
                results = self._faces.restore_batch(photos, on_step=on_step, on_note=on_note, **asked.model_dump())
                _add(times, results[0].timings)
                yield from (result.photo.rgb for result in results)


def _pasted(photo_size: Size, restored: Restored, chosen: Sequence[Decision], new_squares: Iterable[Pixels]) -> Pixels:
    """Return the result's pixels with the chosen faces' squares, which are taken one by one, as they are restored."""
    result = restored.photo
    squares = [decision.square.scaled(photo_size, result.size) for decision in chosen]
    faces = [decision.face.box.scaled(photo_size, result.size) for decision in chosen]
    paste = Paste(result.rgb, squares, faces)
    for index, (square, pixels) in enumerate(zip(squares, new_squares, strict=True)):
        new = resize(pixels, (square.width, square.height))
        # The surroundings' colours: the square was encoded at another scale, and for itself.
        surroundings = to_network(square.of(result.rgb))[None]
        fixed = fix_colors(to_network(new)[None], surroundings, restored.settings.color_fix)
        paste.add(index, from_network(fixed[0]))
    return paste.pixels


def asked_of(settings: FaceSettings, bundle: Bundle | None) -> dict[str, Any]:
    """Return what a result's metadata says of faces before any is found.

    Args:
        settings: of the faces.
        bundle: that restores them, None for the photo's own.
    """
    named = None if bundle is None else {"name": bundle.manifest.name, "digest": bundle.digest}
    return {**settings.model_dump(mode="json"), "bundle": named}


def told(faces: Mapping[str, Any], *, is_done: bool = True) -> str:
    """Return one line about the faces of a result.

    Args:
        faces: from its provenance.
        is_done: whether they are restored already; else only what will be left is told.
    """
    found = faces["found"]
    if not found:
        return "no faces found"
    groups: dict[str, list[str]] = {}
    for face in found:
        if face["done"] == "restored" and not is_done:
            continue
        groups.setdefault(face["done"], []).append(str(face["number"]))
    count = f"{len(found)} face{'s' * (len(found) != 1)} found"
    if list(groups) == ["restored"]:
        return f"{count} and restored"
    if not groups:
        return count
    return f"{count}: " + "; ".join(f"{_numbers(numbers)} {_TOLD[done]}" for done, numbers in groups.items())


_TOLD: dict[str, str] = {
    "restored": "restored",
    "left out": "left out",
    "too small": f"left alone, under {LEAST_PX} pixels",
    "large already": "left alone, as large with the photo as alone",
}


def _numbers(numbers: Sequence[str]) -> str:
    shown = ", ".join(numbers[:8])
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"


def _copied(times: Timings) -> Timings:
    return Timings(dict(times.graphs_ms), dict(times.outside_ms), dict(times.device_ms))


def _add(times: Timings, batch: Timings) -> None:
    """Add what the networks took for a batch of faces, as one stage."""
    for sums, values in ((times.graphs_ms, batch.graphs_ms), (times.device_ms, batch.device_ms)):
        if values:
            sums["faces"] = sums.get("faces", 0.0) + sum(values.values())
