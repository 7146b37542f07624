"""Which photos of files and folders are restored into which files, and which of them are done already."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from engine.cli.captions import SIDECAR, as_asked, sidecar_of
from engine.cli.faces import faces_as_asked
from engine.errors import ImageError, OutputError, RestoreError, UsageError, from_os_error
from engine.image.files import check_name, check_output, list_images, read_provenance
from engine.image.formats import RAW, READ_SUFFIXES, format_of_suffix, output_suffix

#: Marks a result that lies beside its photo.
_RESULT = ".restored"


@dataclass(frozen=True)
class Found:
    """A photo, and the folder that it was found in, itself or below; None if it was named by itself."""

    photo: Path
    folder: Path | None = None


@dataclass(frozen=True)
class PhotoJob:
    """A photo and its results.

    Attributes:
        photo: its file.
        outputs: seeds and files of results that are to be made.
        done: results that are there already.
        error: why nothing can be made of it, if that is known before the work.
    """

    photo: Path
    outputs: tuple[tuple[int, Path], ...]
    done: tuple[Path, ...] = ()
    error: RestoreError | None = None


@runtime_checkable
class JobSource(Protocol):
    """Who has jobs, as they are asked for."""

    def next(self, *, wait: bool) -> PhotoJob | None:
        """Return the next job.

        Args:
            wait: for one that may be given back; else None may only mean that there is none now.
        """
        ...


@dataclass
class ListedJobs:
    """The jobs of a list."""

    jobs: deque[PhotoJob]

    def next(self, *, wait: bool) -> PhotoJob | None:
        return self.jobs.popleft() if self.jobs else None


@dataclass(frozen=True)
class Placement:
    """Where results go, and what becomes of those that are there.

    Attributes:
        output: a file for one photo, a folder for any number, or None: beside each photo.
        samples: results per photo, from successive seeds.
        overwrite: whether they are replaced.
        skip_existing: whether they are kept, whatever made them.
        file_format: of results whose names are not given: one of `engine.image.formats.WRITTEN`, or "same".
    """

    output: Path | None
    samples: int = 1
    overwrite: bool = False
    skip_existing: bool = False
    file_format: str = "png"


def find_photos(names: Sequence[Path], placement: Placement, *, recursive: bool = False) -> list[Found]:
    """Return the photos that files and folders stand for, without results of earlier runs.

    Raises:
        ImageError: there is no such file, or a folder without images.
        InputError: a file or folder cannot be looked at.
    """
    results = placement.output.resolve() if placement.output is not None else None
    found: dict[Path, Found] = {}
    for name in names:
        try:
            for item in _found_at(name, results, recursive=recursive):
                found.setdefault(item.photo, item)
        except OSError as error:  # as where a folder above it may not be entered
            raise from_os_error(error, name, "look at it", "read") from error
    return list(found.values())


def _found_at(name: Path, results: Path | None, *, recursive: bool) -> list[Found]:
    """Return the photos that one file or folder stands for; those in the folder of results are left out."""
    if not name.is_dir():
        if not name.exists():
            raise ImageError("no such file", where=name, fix="check the path")
        return [Found(name)]
    images = [path for path in list_images(name, recursive=recursive) if _RESULT not in path.suffixes]
    if results is not None and results != name.resolve():
        images = [path for path in images if results not in path.resolve().parents]
    if not images:
        fix = None if recursive else "look into its subfolders with --recursive"
        raise ImageError("holds no images", where=name, expected=", ".join(READ_SUFFIXES), fix=fix)
    return [Found(path, name) for path in images]


def plan_jobs(
    found: Sequence[Found], placement: Placement, seed: int, provenance: Callable[[int], dict[str, Any]]
) -> list[PhotoJob]:
    """Return what to restore into which files, all of them checked before any work.

    Args:
        found: the photos.
        placement: of their results.
        seed: of the first result of each.
        provenance: of a seed: what a result is made with.
    A name that is too long is its own photo's error where there are others.

    Raises:
        OutputError: a file could not be written, or two results would have one name.
        UsageError: several photos, and a file for one.
    """
    place = _placer(found, placement)
    jobs = []
    taken: dict[Path, Path] = {}
    inputs = {item.photo.resolve() for item in found}
    for item in found:
        outputs: list[tuple[int, Path]] = []
        done: list[Path] = []
        error: RestoreError | None = None
        for index in range(placement.samples):
            output = place(item)
            if placement.samples > 1:
                output = output.with_name(f"{output.stem}.{seed + index}{output.suffix}")
            try:
                check_name(output)
            except OutputError as refusal:
                if len(found) == 1:
                    raise
                error = refusal
                break
            if output.resolve() in inputs:
                raise OutputError("would replace a photo", where=output, fix="choose another name with -o")
            if output in taken:
                raise OutputError(
                    "two photos would be restored into one file",
                    where=output,
                    found=f"{taken[output]} and {item.photo}",
                    fix="restore them into different folders",
                )
            taken[output] = item.photo
            if _is_kept(item, output, placement, lambda index=index: provenance(seed + index)):  # type: ignore[misc]
                done.append(output)
                continue
            if output.parent.is_dir() or not is_folder(placement.output):  # else it is made when it is needed
                # Of a folder's photo, `_is_kept` has seen none; one that another run has made since then is no error.
                check_output(output, overwrite=placement.overwrite or item.folder is not None)
            outputs.append((seed + index, output))
        jobs.append(PhotoJob(item.photo, () if error else tuple(outputs), tuple(done), error))
    return jobs


def raws_left_out(names: Sequence[Path], *, recursive: bool) -> int:
    """Count the camera raws in folders, which are no photos there: most lie beside their JPEGs."""
    folders = [name for name in names if name.is_dir()]
    return sum(len(list_images(folder, recursive=recursive, suffixes=RAW.suffixes)) for folder in folders)


def file_stamp(photo: Path) -> dict[str, int]:
    """Return by what a photo's file is known again, for the metadata of its results.

    Raises:
        OSError: it cannot be looked at.
    """
    status = photo.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def is_made(output: Path, photo: Path, provenance: dict[str, Any]) -> bool:
    """Tell whether a result is there, of what the photo is now, made as `provenance` asks.

    The photo is what it was if its file has the size and date that the result notes, be that date in the future; or
    if its size is the same, or not noted, and the result is newer: copies of folders have dates of their own.

    Args:
        output: the result's file.
        photo: its photo.
        provenance: bundle, settings and, where they are wanted, whose captions and which faces, as their `asked_of`
            in `engine.cli.captions` and `engine.cli.faces`.
    """
    asked = json.loads(json.dumps(provenance))
    try:
        now, noted = file_stamp(photo), faces_as_asked(as_asked(read_provenance(output)))
        made_ns = output.stat().st_mtime_ns
        takes_sidecar = (asked.get("caption") or {}).get("source") == SIDECAR and sidecar_of(photo).is_file()
        if takes_sidecar and made_ns < sidecar_of(photo).stat().st_mtime_ns:
            return False
    except (OSError, RestoreError):
        return False
    before = noted.get("photo", {"bytes": now["bytes"]})
    is_newer = made_ns >= now["modified_ns"]
    if before != now and not (is_newer and isinstance(before, dict) and before.get("bytes") == now["bytes"]):
        return False
    return all(noted.get(key) == asked.get(key) for key in ("bundle", "settings", "caption", "faces"))


def is_folder(target: Path | None) -> bool:
    """Tell whether `-o` names a folder: one that is there, or a name without an ending."""
    return target is not None and (target.is_dir() or not target.suffix)


def check_folder(target: Path | None) -> None:
    """Find out, before the work, whether the folder of `-o` is there or could be made.

    Raises:
        OutputError: neither.
    """
    if target is None or not is_folder(target) or target.is_dir():
        return
    if os.path.lexists(target):
        raise OutputError("is no folder", where=target, fix="name a folder, or a file with an ending such as .png")
    if not target.parent.is_dir():
        raise OutputError("no such folder", where=target.parent, fix="create it first")


def _is_kept(item: Found, output: Path, placement: Placement, provenance: Callable[[], dict[str, Any]]) -> bool:
    """Tell whether a result that is there is left as it is.

    Of a folder, one that would be made again just so is: a run that was stopped goes on.
    """
    if placement.overwrite or not output.is_file():
        return False
    if placement.skip_existing:
        return True
    if item.folder is None:
        return False
    if not is_made(output, item.photo, provenance()):
        raise OutputError(
            "exists already",
            where=output,
            found="other settings, an older photo, or no result of this engine",
            fix="keep it with --skip-existing, replace it with --overwrite, or choose another folder with -o",
        )
    return True


def _placer(found: Sequence[Found], placement: Placement) -> Callable[[Found], Path]:
    """Return the function from a photo to its result's place."""
    target = placement.output
    if target is not None and not is_folder(target):
        if len(found) > 1:
            raise UsageError("several photos need a folder", where="-o", found=target)
        return lambda item: target

    def folder_of(item: Found) -> Path:
        if target is None:
            return item.photo.parent
        return target / item.photo.parent.relative_to(item.folder) if item.folder is not None else target

    def suffix_of(item: Found) -> str:
        return output_suffix(placement.file_format, item.photo.suffix)

    # A camera's JPEG beside the PNG made from it: then each keeps its whole name.
    places = Counter((folder_of(item), item.photo.stem, suffix_of(item).lower()) for item in found)

    def place(item: Found) -> Path:
        folder, suffix = folder_of(item), suffix_of(item)
        stem = item.photo.stem if places[folder, item.photo.stem, suffix.lower()] == 1 else item.photo.name
        return folder / (f"{stem}{_RESULT}{suffix}" if target is None else f"{stem}{suffix}")

    return place


def check_options(placement: Placement, given_format: str | None, quality: int | None) -> None:
    """Find out whether the options for results' files make sense together.

    Raises:
        UsageError: a file of one format, and another format; or a quality of what has none.
    """
    target = placement.output
    named = None if target is None or is_folder(target) else format_of_suffix(target.suffix)
    if given_format is not None and named is not None and given_format not in ("same", named.name.lower()):
        found = f"{target} and --format {given_format}"
        raise UsageError("the file's ending says another format", where="--format", found=found)
    lossless = named.quality is None if named is not None else placement.file_format in ("png", "tiff")
    if quality is not None and lossless:
        fix = "add --format jpeg, webp or avif, or name a file of that format"
        raise UsageError("a PNG or TIFF has no quality to choose", where="--quality", found=quality, fix=fix)
