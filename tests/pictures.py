"""Encoded photos that tests of serving send."""

from __future__ import annotations

import io

import numpy as np
from conftest import DATA
from PIL import Image

PHOTO = (DATA / "coffee-damaged.jpg").read_bytes()


def small_png(seed: int = 0) -> bytes:
    """Return a picture of 64 × 64 pixels: at that size a restoration takes a moment."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return encoded(coarse.resize((64, 64), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
