"""The part of the page that is about faces: whether they are restored, which were found, which are left out."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.base import Component

from engine.image.files import read_photo
from engine.image.photo import Photo
from engine.image.preview import preview
from engine.page import fragments
from engine.page.sessions import Result
from engine.pipeline.faces import FaceRestorer
from engine.pipeline.restorer import Restorer
from engine.settings import FaceSettings, Settings, validated_faces

#: Longer side in pixels of the picture that boxes are drawn on.
_SHOWN_PX = 640
#: More are not chosen one by one.
_MOST_CHOICES = 200
#: The parts that say how faces are restored.
CONTROLS = ("faces", "face_words", "face_choice", "faces_of")


def lay_out() -> dict[str, Component]:
    """Lay out the controls that stand in sight."""
    with gr.Row():
        parts: dict[str, Component] = {
            "faces": gr.Checkbox(
                label="Faces", info="Restore each face once more, alone", elem_id="faces", min_width=140
            ),
            "find_faces": gr.Button("Find faces", size="sm", elem_id="find-faces", min_width=120),
        }
    parts["faces_found"] = gr.HTML(visible=False, elem_id="faces-found")
    parts["face_choice"] = gr.CheckboxGroup(
        label="Faces to restore", visible=False, elem_id="face-choice", info="Those without a tick are left out"
    )
    parts["faces_of"] = gr.State(None)
    return parts


def lay_out_words() -> dict[str, Component]:
    """Lay out the control that is folded away."""
    field = FaceSettings.model_fields["words"]
    told = field.description or ""
    info = told[:1].upper() + told[1:]
    return {"face_words": gr.Textbox(field.default, label="Face words", info=info, lines=2, elem_id="face-words")}


def settings_from(values: Mapping[str, Any], photos: Sequence[Path]) -> FaceSettings | None:
    """Return how faces are to be restored; None if they are not.

    Args:
        values: of `CONTROLS`, by their names; none where the page has none.
        photos: that are to be restored; faces were chosen in one of them.
    Raises:
        UsageError: the words are too many.
    """
    if not values.get("faces"):
        return None
    known = values.get("faces_of")
    chosen = {str(number) for number in values.get("face_choice") or ()}
    leave: list[int] = []
    if isinstance(known, list) and len(photos) == 1 and known[:2] == _key(photos[0]):
        leave = [number for number in range(1, min(known[2], _MOST_CHOICES) + 1) if str(number) not in chosen]
    return asked({"words": values.get("face_words") or "", "leave": leave})


def asked(value: Any) -> FaceSettings | None:
    """Return what a program says of faces: nothing or False, True, or an object of settings.

    Raises:
        UsageError: something else.
    """
    if value is None or value is False:
        return None
    return validated_faces({} if value is True else value, "faces")


def found_in(path: Path, faces: FaceRestorer, restorer: Restorer, settings: Settings) -> dict[str, Any]:
    """Find the faces of a photo, and return what changes on the page, by the parts' names."""
    photo = read_photo(path, max_pixels=restorer.max_photo_pixels)
    found, nothing = faces.find(photo), FaceSettings()
    decisions = faces.decide(found, restorer.working_size(photo.size, settings), nothing)
    return {"faces": True, **_shown(path, photo, faces.provenance(nothing, found, decisions))}


def again(result: Result) -> dict[str, Any]:
    """Return what controls show for a result's faces, by the parts' names."""
    if result.faces is None:
        return {"faces": False, **hidden()}
    changes = {"faces": True, "face_words": result.faces.words}
    made: Mapping[str, Any] = result.report["faces"]
    return {**changes, **(_shown(result.photo, read_photo(result.before), made) if made["found"] else hidden())}


def hidden() -> dict[str, Any]:
    """Return what hides the faces of a photo."""
    return {"faces_found": gr.update(visible=False), "face_choice": gr.update(visible=False), "faces_of": None}


def is_of(known: Any, photos: Sequence[Path]) -> bool:
    """Tell whether the faces on the page are those of the photo that is there."""
    return isinstance(known, list) and len(photos) == 1 and known[:2] == _key(photos[0])


def _shown(path: Path, photo: Photo, faces: Mapping[str, Any]) -> dict[str, Any]:
    numbers = [face["number"] for face in faces["found"]]
    chosen = [str(face["number"]) for face in faces["found"] if face["done"] != "left out"]
    picture = fragments.faces(f"data:image/webp;base64,{base64.b64encode(preview(photo, _SHOWN_PX)).decode()}", faces)
    choices = [str(number) for number in numbers[:_MOST_CHOICES]]
    return {
        "faces_found": gr.update(value=picture, visible=True),
        "face_choice": gr.update(choices=choices, value=chosen[:_MOST_CHOICES], visible=bool(choices)),
        "faces_of": [*_key(path), len(numbers)],
    }


def _key(path: Path) -> list[Any]:
    """Return by what a photo is known again: its file may have moved."""
    return [path.name, path.stat().st_size]
