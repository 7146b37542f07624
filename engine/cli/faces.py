"""Options and words of the pass over faces; see `engine.pipeline.faces`.

Faces are no setting, so no request to a server can ask for them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from engine.bundle.manifest import read_manifest
from engine.cli.options import path_option, whole_number
from engine.errors import UsageError
from engine.image.photo import Photo, Size
from engine.pipeline.executor import OnStage, OnTile, ignore
from engine.pipeline.faces import MOST, FaceRestorer, FoundFaces, asked_of
from engine.pipeline.restorer import Restored, Restorer
from engine.settings import FaceSettings, validated_faces


@dataclass(frozen=True)
class FaceRequest:
    """How faces are to be restored.

    Attributes:
        settings: of the faces.
        bundle: folder of the bundle for faces; None for the photos' own.
        recorded: what the metadata of a result of the same photo says of its faces, which are taken again.
    """

    settings: FaceSettings
    bundle: Path | None = None
    recorded: Mapping[str, Any] | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """What a result's metadata says of faces before any is found."""
        return {"faces": asked_of(self.settings, None if self.bundle is None else read_manifest(self.bundle))}

    def is_of_another_bundle(self, like: Mapping[str, Any] | None) -> bool:
        """Tell whether the faces of the result that `--like` names were made with another bundle for faces."""
        before = None if like is None else like.get("faces")
        return isinstance(before, dict) and before.get("bundle") != self.asked["faces"]["bundle"]

    def absolute(self) -> FaceRequest:
        """Return the same request for other machines, where the current folder is another."""
        return self if self.bundle is None else replace(self, bundle=self.bundle.absolute())


@dataclass(frozen=True)
class FacePass:
    """The pass over the faces of each photo of a run.

    Attributes:
        restorer: that does it.
        request: how.
    """

    restorer: FaceRestorer
    request: FaceRequest

    @classmethod
    def open(cls, restorer: Restorer, request: FaceRequest, engine: Mapping[str, Any]) -> FacePass:
        """Open what a request needs.

        Args:
            restorer: of the photos.
            request: how faces are restored.
            engine: what `Restorer.open` is called with.
        Raises:
            As `FaceRestorer.open`.
        """
        return cls(FaceRestorer.open(restorer, **{**engine, "bundle": request.bundle}), request)

    @property
    def asked(self) -> dict[str, Any]:
        """What a result's metadata says of faces before any is found."""
        return {"faces": self.restorer.asked(self.request.settings)}

    def find(self, photo: Photo, networks_px: Size) -> FoundFaces:
        """Return a photo's faces, and check, before it is restored, that those to be left out are there.

        Args:
            photo: as it was read.
            networks_px: (width, height) at which the networks will see it.
        Raises:
            UsageError: one is not there.
        """
        recorded = self.request.recorded
        found = None if recorded is None else FoundFaces.from_data(recorded, photo.size)
        found = found or self.restorer.find(photo)
        self.restorer.decide(found, networks_px, self.request.settings)
        return found

    def restore(
        self, photo: Photo, restored: Restored, found: FoundFaces, on_tile: OnTile, on_stage: OnStage = ignore
    ) -> Restored:
        """Restore the faces of a restored photo; see `FaceRestorer.restore`."""
        return self.restorer.restore(photo, restored, found, self.request.settings, on_tile=on_tile, on_stage=on_stage)


def add_faces(parser: argparse.ArgumentParser, *, only_bundle: bool = False) -> None:
    """Add the options for faces.

    Args:
        parser: of the command.
        only_bundle: whether the others are asked for elsewhere, as on a page.
    """
    group = parser.add_argument_group("faces")
    if not only_bundle:
        switch = group.add_mutually_exclusive_group()
        switch.add_argument(
            "--faces",
            action="store_true",
            help="restore each face once more, alone, at the bundle's own size; needs the extra faces",
        )
        switch.add_argument("--no-faces", action="store_true", help="off, where --like has them on")
        fields = FaceSettings.model_fields
        group.add_argument(
            "--face-words", metavar="TEXT", help=f'{fields["words"].description}; default: "{fields["words"].default}"'
        )
        group.add_argument(
            "--leave-face",
            type=whole_number(1, MOST),
            action="append",
            metavar="N",
            help="leave a face as it is, by its number in --report; may be given several times",
        )
    group.add_argument(
        "--faces-bundle",
        type=path_option,
        metavar="DIR",
        help="restore faces with this bundle, such as one with a face LoRA at full strength; default: the photo's own",
    )


def face_request(
    options: argparse.Namespace, photos: Sequence[Path], like: Mapping[str, Any] | None
) -> FaceRequest | None:
    """Return how a command line asks for faces; None if it does not.

    Args:
        options: of the command.
        photos: that it is about.
        like: metadata of the result that `--like` names.
    Raises:
        UsageError: options do not go together.
    """
    before = None if like is None or options.no_faces else like.get("faces")
    if not options.faces and not isinstance(before, dict):
        for name in ("face_words", "leave_face", "faces_bundle"):
            if getattr(options, name) is not None:
                raise UsageError("does nothing without --faces", where=f"--{name.replace('_', '-')}", fix="add --faces")
        return None
    if options.leave_face is not None and len(photos) != 1:
        raise UsageError(
            "faces have numbers in one photo",
            where="--leave-face",
            found=f"{len(photos)} photos",
            fix="restore that photo by itself",
        )
    before = before if isinstance(before, dict) else {}
    same = before if like is not None and len(photos) == 1 and _is_same(photos[0], like) else {}
    words = options.face_words if options.face_words is not None else before.get("words")
    leave = options.leave_face if options.leave_face is not None else same.get("leave", ())
    given = {"leave": leave, **({} if words is None else {"words": words})}
    settings = validated_faces(given, "faces")
    settings = settings.model_copy(update={"leave": tuple(sorted(set(settings.leave)))})
    return FaceRequest(settings, options.faces_bundle, same or None)


def _is_same(photo: Path, like: Mapping[str, Any]) -> bool:
    """Tell whether a result was made of a file of this photo's size."""
    noted = like.get("photo")
    return isinstance(noted, dict) and photo.is_file() and noted.get("bytes") == photo.stat().st_size


def faces_as_asked(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return a result's metadata as it was asked for: without the faces that were found."""
    faces = provenance.get("faces")
    if not isinstance(faces, dict):
        return provenance
    asked = asked_of(FaceSettings(), None)
    return {**provenance, "faces": {name: faces.get(name) for name in asked}}


# -- what a person sees ---------------------------------------------------------------------------


def face_style() -> str:
    """Return the style sheet of `boxes_html`."""
    return (files("engine.cli") / "faces.css").read_text("utf-8")


def boxes_html(faces: Mapping[str, Any] | None) -> str:
    """Return the boxes of a result's faces, numbered, to be laid over a picture that fills its element.

    Args:
        faces: from the result's provenance; None gives nothing.
    """
    if faces is None:
        return ""
    width, height = faces["size_px"]
    spans = []
    for face in faces["found"]:
        left, top, right, bottom = face["box_px"]
        place = f"left:{100 * left / width:.2f}%;top:{100 * top / height:.2f}%;" + (
            f"width:{100 * (right - left) / width:.2f}%;height:{100 * (bottom - top) / height:.2f}%"
        )
        kind = "face" if face["done"] == "restored" else "face left"
        told = escape(f"face {face['number']}: {face['done']}", quote=True)
        spans.append(f'<span class="{kind}" style="{place}" title="{told}"><b>{face["number"]}</b></span>')
    return "".join(spans)
