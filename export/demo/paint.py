"""Colours, fills and brush strokes, of which the made pictures consist.

Sizes are in drawn pixels; a box is what the canvas holds of it.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Outline = list[tuple[float, float]]

_FIELD = 512  # side of the fractal fields


def palette_of(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a few colours that go together, u8[N, 3]: greys and muted ones mostly, as in nature."""
    count = int(rng.integers(3, 12))
    hues = (rng.uniform(0, 1) + rng.normal(0, rng.uniform(0.02, 0.4), count)) % 1.0
    saturations, values = rng.beta(1.1, rng.uniform(1.2, 4.0), count), rng.beta(1.1, 1.1, count)
    colours = [colorsys.hsv_to_rgb(*triple) for triple in zip(hues, saturations, values, strict=True)]
    return (np.array(colours) * 255).astype(np.uint8)


def pick(rng: np.random.Generator, palette: NDArray[np.uint8]) -> Colour:
    """Return a colour of a palette, a little lighter, darker or otherwise."""
    base = palette[rng.integers(len(palette))].astype(int) + rng.integers(-14, 15, 3) + rng.integers(-25, 26)
    red, green, blue = (int(value) for value in base.clip(0, 255))
    return red, green, blue


def hsv(rng: np.random.Generator, *ranges: tuple[float, float]) -> Colour:
    """Return a colour with hue, saturation and value drawn from ranges in 0 … 1."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in ranges)
    red, green, blue = (int(255 * part) for part in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))
    return red, green, blue


def fill(rng: np.random.Generator, width: int, height: int, palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return u8[height, width, 3]: one colour, a gradient, a fractal texture or a grating."""
    first, kind = pick(rng, palette), rng.random()
    if kind < 0.25:
        return np.broadcast_to(np.array(first, np.uint8), (height, width, 3))
    if kind < 0.55:
        return gradient(rng, width, height, first, pick(rng, palette))
    second = np.array(pick(rng, palette), np.float32)
    if kind < 0.88:
        mix = 0.5 + rng.uniform(0.1, 0.5) * field(rng, width, height, (0.3, 2.2))
    else:
        mix = _grating(rng, width, height)
    mix = mix.clip(0, 1)[:, :, None]
    return (np.array(first, np.float32) * (1 - mix) + second * mix).astype(np.uint8)


def gradient(rng: np.random.Generator, width: int, height: int, first: Colour, second: Colour) -> NDArray[np.uint8]:
    """Return u8[height, width, 3]: from one colour to another, in a random direction."""
    across, down = rng.uniform(-1, 1, 2)
    ramp = across * np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :] + (
        down * np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    )
    ramp = (0.5 + ramp)[:, :, None]
    return (
        (np.array(first, np.float32) * (1 - ramp) + np.array(second, np.float32) * ramp).clip(0, 255).astype(np.uint8)
    )


def _grating(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    turn, period = rng.uniform(0, math.pi), math.exp(rng.uniform(math.log(5), math.log(50)))
    phase = math.cos(turn) * np.arange(width, dtype=np.float32)[None, :] + (
        math.sin(turn) * np.arange(height, dtype=np.float32)[:, None]
    )
    wave = np.sin(phase * (2 * math.pi / period) + rng.uniform(0, 6.28))
    return np.asarray(0.5 + 0.5 * np.clip(wave * rng.uniform(0.6, 4.0), -1, 1), dtype=np.float32)


@cache
def _fields() -> NDArray[np.float32]:
    """Return fractal fields f32[12, 512, 512] of unit variance, spectra 1/f^a with a from 0.3 to 2.2."""
    rng = np.random.default_rng(2021)
    frequency = np.hypot(np.fft.fftfreq(_FIELD)[:, None], np.fft.rfftfreq(_FIELD)[None, :])
    frequency[0, 0] = np.inf
    fields = []
    for exponent in np.linspace(0.3, 2.2, 12):
        spectrum = np.fft.rfft2(rng.standard_normal((_FIELD, _FIELD))) * frequency**-exponent
        field = np.fft.irfft2(spectrum, (_FIELD, _FIELD))
        fields.append((field / field.std()).astype(np.float32))
    return np.stack(fields)


def field(
    rng: np.random.Generator, width: int, height: int, exponents: tuple[float, float], stretch: int = 1
) -> NDArray[np.float32]:
    """Return a window f32[height, width] of a fractal field with its exponent in a range.

    `stretch` makes it wider than high, as clouds and ripples are.
    """
    span = np.linspace(0.3, 2.2, 12)
    low, high = (int(np.abs(span - bound).argmin()) for bound in exponents)
    field = _fields()[rng.integers(low, high + 1)]
    top, left = rng.integers(0, _FIELD, 2)
    rows = (top + np.arange(height) * (stretch if stretch > 1 else 1)) % _FIELD
    columns = (left + np.arange(width)) % _FIELD
    window = field[rows[:, None], columns[None, :]]
    return window if rng.random() < 0.5 else -window


def paste(
    canvas: Image.Image,
    outline: Outline,
    fill: Callable[[int, int], NDArray[np.uint8]],
    *,
    soft: bool,
) -> None:
    """Paint a polygon; `fill` gives its colours, u8[height, width, 3], for a width and a height."""
    xs, ys = zip(*outline, strict=True)
    left, top = max(0, int(min(xs))), max(0, int(min(ys)))
    right, bottom = min(canvas.width, int(max(xs)) + 2), min(canvas.height, int(max(ys)) + 2)
    if right <= left or bottom <= top:
        return
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in outline], fill=255)
    if soft:  # out of focus
        mask = mask.filter(ImageFilter.GaussianBlur(4))
    canvas.paste(Image.fromarray(np.ascontiguousarray(fill(right - left, bottom - top))), (left, top), mask)


def curve(start: NDArray[np.float64], bend: NDArray[np.float64], end: NDArray[np.float64]) -> Outline:
    """Return 16 points of the quadratic Bézier curve through a start and an end."""
    t = np.linspace(0, 1, 16)[:, None]
    points = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
    return [(float(x), float(y)) for x, y in points]
