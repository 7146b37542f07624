"""Pictures to train on: which of a folder's files are, how they are cut, and what they show.

A file that cannot be used is left out and told: among a thousand there is always one. That none is left, or that
captions are missing, is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.bundle.hashing import hash_file
from engine.bundle.storage import write_cache
from engine.cli.captions import SHOWN_PX, Captioner, CaptionError
from engine.errors import ImageError, InputError, RestoreError, from_os_error
from engine.image.files import list_images, read_photo
from engine.image.formats import READ_SUFFIXES
from engine.image.photo import Photo, Pixels, Size, resize
from engine.image.preview import small_jpeg

#: Sides of buckets are multiples of this, in pixels: of the latent's cells and the UNet's halvings.
MULTIPLE_PX = 64
#: The longest bucket is so many times as long as wide.
_MAX_ASPECT = 2.0
#: Problems that are told one by one.
_TOLD = 5


@dataclass(frozen=True)
class Crop:
    """How pictures are brought to one size.

    Attributes:
        size_px: side of the square, or of one of the same area.
        buckets: keep about the picture's own shape, in steps of 64 pixels, instead of a square.
    """

    size_px: int = 512
    buckets: bool = False

    def target(self, size: Size) -> Size:
        """Return the (width, height) in pixels that a picture of a (width, height) is brought to."""
        if not self.buckets:
            return self.size_px, self.size_px
        aspect = min(_MAX_ASPECT, max(1 / _MAX_ASPECT, size[0] / size[1]))
        width, height = (self.size_px * math.sqrt(ratio) for ratio in (aspect, 1 / aspect))
        return _rounded(width), _rounded(height)

    def largest(self) -> Size:
        """Return the (width, height) in pixels of the largest target that there is."""
        shapes = [self.target((hundredths, 100)) for hundredths in range(50, 201)]
        return max(shapes, key=lambda size: size[0] * size[1])

    def cut(self, photo: Photo, path: Path) -> Pixels:
        """Return a picture, shrunk until it covers its target and cut to the middle: f32[H, W, 3] in [0, 1].

        Raises:
            ImageError: it is smaller than its target: enlarged, it would teach blur.
        """
        (width, height), (wide, high) = photo.size, self.target(photo.size)
        if width < wide or height < high:
            raise ImageError(
                "is too small to train on",
                where=path,
                expected=f"at least {wide} × {high} pixels",
                found=f"{width} × {height}",
                fix="leave it out, or lower --size",
            )
        scale = max(wide / width, high / height)
        shrunk = resize(photo.rgb, (max(wide, round(width * scale)), max(high, round(height * scale))))
        top, left = (shrunk.shape[0] - high) // 2, (shrunk.shape[1] - wide) // 2
        return shrunk[top : top + high, left : left + wide]


def _rounded(side: float) -> int:
    return max(1, round(side / MULTIPLE_PX)) * MULTIPLE_PX


@dataclass(frozen=True)
class Picture:
    """A file to train on, and the SHA-256 of its content."""

    path: Path
    digest: str


def find_pictures(folder: Path, *, recursive: bool = False) -> tuple[list[Picture], list[RestoreError]]:
    """Return a folder's pictures by name, each content once, and what is wrong with the others.

    Raises:
        InputError: there is no such folder, or it cannot be read.
        ImageError: it holds no pictures.
    """
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "no such folder"
        raise InputError(problem, where=folder, expected="a folder of pictures", fix="check --images")
    files = list_images(folder, recursive=recursive)
    if not files:
        fix = None if recursive else "look into its subfolders with --recursive"
        raise ImageError("holds no images", where=folder, expected=", ".join(READ_SUFFIXES), fix=fix)
    first: dict[str, Picture] = {}
    problems: list[RestoreError] = []
    for path in files:
        try:
            digest = hash_file(path)
        except OSError as error:
            problems.append(from_os_error(error, path, "read the image", "read"))
            continue
        if digest in first:  # on both sides of the split, it would make the held-out loss a lie
            problems.append(ImageError("is the same as another", where=path, found=first[digest].path.name))
            continue
        first[digest] = Picture(path, digest)
    return list(first.values()), problems


def told(problems: Sequence[RestoreError], total: int) -> Iterator[str]:
    """Yield the lines that say which pictures are left out."""
    if problems:
        yield f"{len(problems)} of {total} pictures are left out:"
        for problem in problems[:_TOLD]:
            found = f" ({problem.found})" if problem.found else ""
            yield f"  {problem.where}: {problem.problem}{found}"
        if len(problems) > _TOLD:
            yield f"  and {len(problems) - _TOLD} more"


def caption_of(picture: Picture, captioner: Captioner, cut: Callable[[Picture], Pixels], cache: Path) -> str:
    """Return what a picture shows; what a server has said once is kept.

    Args:
        picture: that is described.
        captioner: who describes it.
        cut: gives its pixels, for those who look.
        cache: folder of answers.
    Raises:
        CaptionError: there is no caption.
        ImageError: the picture cannot be read.
    """
    if not captioner.looks:
        return captioner.describe(picture.path, None).text
    key = hashlib.sha256(f"{picture.digest} {captioner.source} {captioner.model}".encode()).hexdigest()
    file = cache / "captions" / f"{key}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["text"]
        if isinstance(kept, str) and kept:
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked yet, or damaged: it is asked
    text = captioner.describe(picture.path, small_jpeg(Photo(cut(picture)), SHOWN_PX)).text
    write_cache(file, json.dumps({"text": text}).encode())
    return text


def require_captions(problems: Sequence[tuple[Path, CaptionError]], total: int) -> None:
    """Refuse to train where captions are missing.

    Raises:
        CaptionError: some are; the first ones are named.
    """
    if problems:
        path, first = problems[0]
        names = ", ".join(each.name for each, _ in problems[:_TOLD]) + (" …" if len(problems) > _TOLD else "")
        raise CaptionError(
            f"{len(problems)} of {total} pictures have no caption",
            where=path.parent,
            expected=f"a text file beside each, such as {path.stem}.txt, or an answer of the server",
            found=f"{first.problem}; without: {names}",
            fix="write them, ask a server with --caption URL, or train without words with --caption none",
        )


def load_cut(picture: Picture, crop: Crop) -> Pixels:
    """Return a picture's pixels as it is trained on: f32[H, W, 3] in [0, 1].

    Raises:
        ImageError: it cannot be read, or is too small.
    """
    return crop.cut(read_photo(picture.path), picture.path)


def split(pictures: Sequence[Picture], held_out: int) -> tuple[list[Picture], list[Picture]]:
    """Return the pictures that are trained on, and those that only judge.

    By their content: a picture stays on its side when others come and go, or are renamed.

    Args:
        pictures: at least two.
        held_out: how many are to judge.
    """
    ordered = sorted(pictures, key=lambda picture: picture.digest)
    return ordered[held_out:], ordered[:held_out]
