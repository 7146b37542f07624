"""What restorations are judged on: photos that packages install, a folder of the user's, or made pictures."""

from __future__ import annotations

import importlib.util
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
#: Sources of images by name, with what a person is told of them.
SOURCES = {
    "photos": "eight colour photos that scikit-image installs",
    "others": "twelve more photos, which no choice was made on",
    "choices": "six more, to choose settings on",
    "leaves": "made by program, as the demo's training pictures are",
    "landscape": "likewise",
    "portrait": "likewise",
}
_MADE = 16  # pictures of a family
#: Photos by name: the package that installs each, and the file in it; black-and-white ones have three equal channels.
_OTHERS = {
    "grace hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "pagoda": ("sklearn", "datasets/images/china.jpg"),
    "dahlia": ("sklearn", "datasets/images/flower.jpg"),
    "lion": ("gradio", "media_assets/images/lion.jpg"),
    "cheetah's face": ("gradio", "media_assets/images/cheetah1.jpg"),
    "running cheetah": ("gradio", "media_assets/images/cheetah.jpg"),
    "tower": ("gradio", "media_assets/images/tower.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "cameraman": ("skimage", "data/camera.png"),
    "coins": ("skimage", "data/coins.png"),
    "fields from the air": ("pywt", "data/aero.npz"),
    "stairs": ("pywt", "data/ascent.npz"),
}
_CHOICES = {
    "groot": ("gradio", "media_assets/images/groot.jpeg"),
    "cheetah's cub": ("gradio", "test_data/cheetah2.jpg"),
    "moon": ("skimage", "data/moon.png"),
    "brick": ("skimage", "data/brick.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
}


def load_images(source: str, side: int) -> dict[str, Rgb]:
    """Return the images of a source by name, each the square in its middle.

    Args:
        source: one of `SOURCES`, of whose families made by program those pictures are taken that no
            training has seen; or a folder.
        side: in pixels; larger images are cut, smaller ones are refused.
    Returns:
        f32[side, side, 3] in [0, 1].
    Raises:
        UsageError: no such source, or a package with its photos is not installed. ImageError: an image
            cannot be read or is too small.
    """
    if source in get_args(Family):
        pictures = (make_picture(source, 0, HELD_OUT + index, side).rgb for index in range(_MADE))  # type: ignore[arg-type]
        return {f"{source} {index}": _unit(rgb) for index, rgb in enumerate(pictures)}
    if source == "photos":
        return {name: _middle(rgb, side, name) for name, rgb in _scikit_photos().items()}
    if source in SOURCES:
        shipped = _OTHERS if source == "others" else _CHOICES
        return {name: _middle(_shipped(*place), side, name) for name, place in shipped.items()}
    folder = Path(source)
    if not folder.is_dir():
        raise UsageError("no such images", where="--images", expected=f"{', '.join(SOURCES)} or a folder", found=source)
    found = {path.name: _middle(read_photo(path).rgb, side, str(path)) for path in list_images(folder)}
    if not found:
        raise ImageError("holds no images", where=folder)
    return found


def _shipped(package: str, name: str) -> Rgb:
    """Return a photo that a package installs; the package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UsageError(
            "a package whose photos are wanted is not installed",
            where=package,
            fix="pip install 'restoration-engine[photos]'",
        )
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise ImageError("is not in the installed version of its package", where=path)
    if path.suffix != ".npz":
        return read_photo(path).rgb
    with np.load(path) as arrays:
        (plane,) = arrays.values()
    return np.repeat(_unit(plane.astype(np.uint8))[:, :, None], 3, axis=2)


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
