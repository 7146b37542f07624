"""What restorations are judged on: scikit-image's photos, a folder of the user's, or made pictures."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ImageError, UsageError
from engine.image.files import list_images, read_photo
from export.demo.data import HELD_OUT
from export.demo.pictures import Family, make_picture

Rgb = NDArray[np.float32]
PHOTOS = "photos"
_MADE = 16  # pictures of a family


def load_images(source: str, side: int) -> dict[str, Rgb]:
    """Return the images of a source by name, each the square in its middle.

    Args:
        source: "photos", the colour photos that scikit-image installs; a family of pictures made by
            program, of which those are taken that no training has seen; or a folder.
        side: in pixels; larger images are cut, smaller ones are refused.
    Returns:
        f32[side, side, 3] in [0, 1].
    Raises:
        UsageError: no such source. ImageError: an image cannot be read or is too small.
    """
    if source == PHOTOS:
        return {name: _middle(rgb, side, name) for name, rgb in _scikit_photos().items()}
    if source in get_args(Family):
        pictures = (make_picture(source, 0, HELD_OUT + index, side).rgb for index in range(_MADE))  # type: ignore[arg-type]
        return {f"{source} {index}": _unit(rgb) for index, rgb in enumerate(pictures)}
    folder = Path(source)
    if not folder.is_dir():
        raise UsageError(
            "no such images",
            where="--images",
            expected=f"{PHOTOS}, {', '.join(get_args(Family))} or a folder",
            found=source,
        )
    found = {path.name: _middle(read_photo(path).rgb, side, str(path)) for path in list_images(folder)}
    if not found:
        raise ImageError("holds no images", where=folder)
    return found


def _scikit_photos() -> dict[str, Rgb]:
    from skimage import data

    left, right, _ = data.stereo_motorcycle()
    photos = {
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "motorcycle left": left,
        "motorcycle right": right,
        "hubble deep field": data.hubble_deep_field(),
        "retina": data.retina(),
    }
    return {name: _unit(photo[:, :, :3]) for name, photo in photos.items()}


def _unit(rgb: NDArray[np.uint8]) -> Rgb:
    return rgb.astype(np.float32) / np.float32(255)


def _middle(rgb: Rgb, side: int, name: str) -> Rgb:
    height, width = rgb.shape[:2]
    if min(height, width) < side:
        raise ImageError("is too small", where=name, expected=f"at least {side} × {side}", found=f"{width} × {height}")
    top, left = (height - side) // 2, (width - side) // 2
    return rgb[top : top + side, left : left + side]


def contact_sheet(rows: list[list[Rgb]], labels: list[str], columns: list[str]) -> Image.Image:
    """Return a sheet of pictures, a row per image, with what each column shows above it.

    Args:
        rows: f32[side, side, 3] in [0, 1] each.
        labels: of the rows. columns: of the columns.
    """
    from PIL import ImageDraw, ImageFont

    side, gap, head = rows[0][0].shape[0], 6, 22
    sheet = Image.new("RGB", (len(columns) * (side + gap) + gap, head + len(rows) * (side + head + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, column in enumerate(columns):
        draw.text((gap + place * (side + gap), 3), column, fill="black", font=font)
    for line, (label, pictures) in enumerate(zip(labels, rows, strict=True)):
        top = head + line * (side + head + gap)
        readable = label.replace("σ", "sigma")  # Pillow's own font has no Greek
        draw.text((gap, top + 2), readable, fill="black", font=font)
        for place, picture in enumerate(pictures):
            eight_bit = np.rint(picture.clip(0, 1) * 255).astype(np.uint8)
            sheet.paste(Image.fromarray(eight_bit), (gap + place * (side + gap), top + head))
    return sheet
