"""What is done to pictures before they are restored: Table 1's degradations and mixtures of them.

Training and `benchmarks/quality.py` share it. All on 8-bit-like images in [0, 1], and the result is
rounded to 8 bits, as what people have is.
Source: Table 1 of the paper; the mixtures follow Real-ESRGAN (arXiv 2107.10833) in spirit.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

Rgb = NDArray[np.float32]


@dataclass(frozen=True)
class Degradation:
    """Blur, then downsampling, then noise, then JPEG; each may be missing.

    Attributes:
        blur_sigma: std of the Gaussian blur in pixels.
        factor: by which both sides are divided, bicubic and antialiased.
        noise_sigma: std of the Gaussian noise, of 255.
        jpeg_quality: of Pillow's encoder, 1 … 95.
    """

    blur_sigma: float = 0.0
    factor: int = 1
    noise_sigma: float = 0.0
    jpeg_quality: int | None = None


#: The paper's Table 1, by the names of its blocks.
TABLE_1 = {
    "blur σ=3, noise σ=30": Degradation(blur_sigma=3.0, noise_sigma=30.0),
    "×4": Degradation(factor=4),
    "blur σ=2, ×4, noise σ=1": Degradation(blur_sigma=2.0, factor=4, noise_sigma=1.0),
}


def degrade(rgb: Rgb, degradation: Degradation, rng: np.random.Generator) -> Rgb:
    """Return a degraded picture.

    Args:
        rgb: f32[H, W, 3] in [0, 1]; sides multiples of `factor`.
        degradation: what is done.
        rng: of the noise.
    Returns:
        f32[H / factor, W / factor, 3], multiples of 1/255 in [0, 1].
    """
    if degradation.blur_sigma:
        sigma = degradation.blur_sigma
        rgb = gaussian_filter(rgb, (sigma, sigma, 0.0), mode="reflect")
    if degradation.factor > 1:
        size = (rgb.shape[1] // degradation.factor, rgb.shape[0] // degradation.factor)
        rgb = _resized(rgb, size)
    if degradation.noise_sigma:
        rgb = rgb + rng.standard_normal(rgb.shape, dtype=np.float32) * np.float32(degradation.noise_sigma / 255)
    levels = (rgb.clip(0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    if degradation.jpeg_quality is not None:
        buffer = io.BytesIO()
        Image.fromarray(levels).save(buffer, "JPEG", quality=degradation.jpeg_quality)
        levels = np.asarray(Image.open(buffer))
    return levels.astype(np.float32) / np.float32(255)


def random_degradation(rng: np.random.Generator, table_1: float = 0.5) -> Degradation:
    """Return one of Table 1's, in a share of the cases, or a mixture of random strength."""
    if rng.random() < table_1:
        return list(TABLE_1.values())[rng.integers(len(TABLE_1))]
    return Degradation(
        blur_sigma=float(rng.uniform(0.3, 3.5)) if rng.random() < 0.6 else 0.0,
        factor=int(rng.choice([1, 1, 2, 4])),
        noise_sigma=float(rng.uniform(0, 40) * rng.random()) if rng.random() < 0.7 else 0.0,
        jpeg_quality=int(rng.integers(25, 96)) if rng.random() < 0.4 else None,
    )


def _resized(rgb: Rgb, size: tuple[int, int]) -> Rgb:
    planes = [Image.fromarray(np.ascontiguousarray(rgb[:, :, channel])) for channel in range(rgb.shape[2])]
    return np.stack([np.asarray(plane.resize(size, Image.Resampling.BICUBIC)) for plane in planes], axis=2)
