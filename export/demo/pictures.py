"""Pictures made by program, to train on: no photo is ever seen in training.

"Dead leaves" pictures, shapes that occlude each other with a power law of sizes, have the statistics
of natural images that restoration needs: edges at every scale, flat areas, textures, junctions.
Two families of their own, landscapes and portraits, are for the LoRAs.

A picture follows from (family, seed, index) alone. Everything is drawn at twice the size and reduced,
so edges have the softness that a camera gives them.
Source: Achddou, Gousseau, Ladjal: "Synthetic images as a regularity prior for image restoration
neural networks" (SSVM 2021).
"""

from __future__ import annotations

import colorsys
import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from export.demo.paint import Colour, Outline, curve, fill, palette_of, paste, pick
from export.demo.scenes import paint_landscape, paint_portrait

Family = Literal["leaves", "landscape", "portrait"]

#: Pictures are drawn this many times larger.
OVERSAMPLING = 2
_SMALLEST_TEXTURED = 9  # radius in drawn pixels, below which a leaf has one colour


@dataclass(frozen=True)
class Picture:
    """A picture and the words that describe it.

    Attributes:
        rgb: u8[H, W, 3].
        caption: a few words of the small vocabulary, such as "a landscape with trees, green".
    """

    rgb: NDArray[np.uint8]
    caption: str


def make_picture(family: Family, seed: int, index: int, size: int) -> Picture:
    """Return picture number `index` of a family.

    Args:
        family: "leaves", "landscape" or "portrait".
        seed, index: what it follows from; >= 0.
        size: side in pixels.
    """
    rng = np.random.default_rng([_FAMILIES.index(family), seed, index])
    drawn = size * OVERSAMPLING
    canvas, words = _PAINTERS[family](rng, drawn)
    small = canvas.resize((size, size), Image.Resampling.BOX if rng.random() < 0.5 else Image.Resampling.LANCZOS)
    rgb = _light(np.asarray(small), rng)
    caption = f"{words}, {_colour_word(rgb)}"
    return Picture(rgb, caption)


# -- dead leaves ----------------------------------------------------------------------------------


def _dead_leaves(rng: np.random.Generator, size: int) -> tuple[Image.Image, str]:
    palette = palette_of(rng)
    canvas = Image.fromarray(fill(rng, size, size, palette))
    smallest, largest = rng.uniform(1.5, 8.0), size * rng.uniform(0.2, 0.6)
    power = rng.uniform(1.8, 3.2)
    # Sizes by inverse transform; large ones first, half of the time, as in a scene with a ground.
    count = int(rng.uniform(150, 900))
    low, high = smallest ** (1 - power), largest ** (1 - power)
    radii = (low + rng.random(count) * (high - low)) ** (1 / (1 - power))
    if rng.random() < 0.5:
        radii = np.sort(radii)[::-1]
    # A few large ones always, so that no picture is grain alone.
    radii = np.concatenate([rng.uniform(size * 0.08, size * 0.4, rng.integers(2, 8)), radii])
    draw = ImageDraw.Draw(canvas)
    angular = rng.random()
    for radius in radii:
        x, y = rng.uniform(-0.05, 1.05, 2) * size
        outline = _polygon(rng, x, y, radius) if rng.random() < angular else _ellipse(rng, x, y, radius)
        if radius < _SMALLEST_TEXTURED:
            draw.polygon(outline, fill=pick(rng, palette))
        else:
            paste(canvas, outline, lambda w, h: fill(rng, w, h, palette), soft=rng.random() < 0.12)
    words = "shapes"
    for _ in range(rng.integers(0, 12)):
        _stroke(draw, rng, size, pick(rng, palette))
    if rng.random() < 0.3:
        words = "shapes and text"
        for _ in range(rng.integers(1, 7)):
            _text(canvas, rng, pick(rng, palette))
    return canvas, f"a picture of {words}"


def _ellipse(rng: np.random.Generator, x: float, y: float, radius: float) -> Outline:
    flat, turn = rng.uniform(0.35, 1.0), rng.uniform(0, math.pi)
    angles = np.linspace(0, 2 * math.pi, 12 if radius < 6 else 40, endpoint=False)
    u, v = radius * np.cos(angles), radius * flat * np.sin(angles)
    return _placed(u, v, x, y, turn)


def _polygon(rng: np.random.Generator, x: float, y: float, radius: float) -> Outline:
    turn = rng.uniform(0, 2 * math.pi)
    if rng.random() < 0.5:  # a bar or a rectangle
        width, height = radius, radius * rng.uniform(0.08, 1.0)
        u, v = np.array([-1, 1, 1, -1]) * width, np.array([-1, -1, 1, 1]) * height
    else:
        corners = int(rng.integers(3, 9))
        angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
        reach = radius * rng.uniform(0.5, 1.0, corners)
        u, v = reach * np.cos(angles), reach * np.sin(angles)
    return _placed(u, v, x, y, turn)


def _placed(u: NDArray[np.float64], v: NDArray[np.float64], x: float, y: float, turn: float) -> Outline:
    cos, sin = math.cos(turn), math.sin(turn)
    return list(zip((x + cos * u - sin * v).tolist(), (y + sin * u + cos * v).tolist(), strict=True))


def _stroke(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, colour: Colour) -> None:
    start, bend, end = rng.uniform(-0.1, 1.1, (3, 2)) * size
    draw.line(curve(start, bend, end), fill=colour, width=int(rng.integers(1, 7)), joint="curve")


def _text(canvas: Image.Image, rng: np.random.Generator, colour: Colour) -> None:
    letters = "".join(rng.choice(list(string.ascii_letters + string.digits + "  .,-"), rng.integers(3, 18)))
    font = ImageFont.load_default(float(rng.uniform(14, 60)))
    left, top, right, bottom = font.getbbox(letters)
    mask = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(mask).text((-left, -top), letters, fill=255, font=font)
    if rng.random() < 0.5:
        mask = mask.rotate(float(rng.uniform(-90, 90)), Image.Resampling.BILINEAR, expand=True)
    x, y = (int(value) for value in rng.uniform(-0.1, 0.9, 2) * canvas.width)
    canvas.paste(colour, (x, y), mask)


# -- light and words -------------------------------------------------------------------------------


def _light(rgb: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the picture under uneven light and with a tone curve of its own."""
    side = rgb.shape[0]
    across, down = rng.normal(0, 0.15, 2)
    lit = 1 + across * np.linspace(-1, 1, side)[None, :, None] + down * np.linspace(-1, 1, side)[:, None, None]
    tone = (rgb.astype(np.float32) / 255) ** rng.uniform(0.75, 1.3)
    black, white = rng.uniform(0, 0.12), rng.uniform(0.85, 1.02)
    return ((black + (white - black) * tone * lit).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _colour_word(rgb: NDArray[np.uint8]) -> str:
    red, green, blue = (float(value) / 255 for value in rgb.reshape(-1, 3).mean(axis=0))
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < 0.12:
        return "white" if value > 0.7 else "grey" if value > 0.25 else "black"
    return ("red", "yellow", "green", "blue", "blue", "red")[int(hue * 6) % 6]


_PAINTERS: dict[Family, Callable[[np.random.Generator, int], tuple[Image.Image, str]]] = {
    "leaves": _dead_leaves,
    "landscape": paint_landscape,
    "portrait": paint_portrait,
}
_FAMILIES: tuple[Family, ...] = ("leaves", "landscape", "portrait")
