"""Colour fix: give a restored image the colours of its stage-1 reference.

Sampling may shift colours; the stage-1 image has them right but lacks detail. Both methods work on
float images in [-1, 1]. Pure NumPy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]

WAVELET_LEVELS = 5
#: How far a level's low band sees, all levels together.
_REACH = 2**WAVELET_LEVELS - 1
#: Rows that are worked on at a time: a large photo's low bands would be three more of it.
_ROWS = 256
ADAIN_EPS = 1e-5


def wavelet(content: Image, reference: Image, *, out: Image | None = None) -> Image:
    """Join the detail of `content` with the low frequencies of `reference`.

    Args:
        content: f32[B,3,H,W] in [-1, 1], the restored image.
        reference: f32[B,3,H,W] in [-1, 1], the stage-1 image.
        out: where the result goes, as in NumPy; it may be `content`.
    Returns:
        f32[B,3,H,W]; may leave [-1, 1] slightly.
    Source: StableSR (arXiv 2305.07015), wavelet colour correction: a trous, five levels.
    """
    fixed, height = np.empty_like(content) if out is None else out, content.shape[2]
    above = content[:, :, :0]  # what the rows above were, as far as the next ones see them
    for top in range(0, height, _ROWS):
        bottom = min(top + _ROWS, height)
        first, last = top - above.shape[2], min(height, bottom + _REACH)
        part = np.concatenate([above, content[:, :, top:last]], axis=2)
        above = content[:, :, max(first, bottom - _REACH) : bottom].copy()
        # The high band is what the low band leaves, so one subtraction replaces a sum over levels.
        rows = part - _low_band(part) + _low_band(reference[:, :, first:last])
        fixed[:, :, top:bottom] = rows[:, :, top - first : bottom - first]
    return fixed


def adain(content: Image, reference: Image, *, out: Image | None = None) -> Image:
    """Give each channel of `content` the mean and deviation of that channel in `reference`.

    Args:
        content, reference: f32[B,3,H,W] in [-1, 1].
        out: where the result goes, as in NumPy; it may be `content`.
    Returns:
        f32[B,3,H,W].
    Source: AdaIN (arXiv 1703.06868), Eq. 8; variances unbiased, plus 1e-5.
    """
    content_mean, content_std = _statistics(content)
    reference_mean, reference_std = _statistics(reference)
    fixed = np.subtract(content, content_mean, out=out)
    fixed *= reference_std / content_std
    fixed += reference_mean
    return fixed


def _low_band(image: Image) -> Image:
    low = image
    for level in range(WAVELET_LEVELS):
        low = _blur(_blur(low, 2**level, axis=2), 2**level, axis=3)
    return low


def _blur(image: Image, dilation: int, axis: int) -> Image:
    """Convolve with [1 2 1] / 4 spread by `dilation` along one axis, edges replicated."""
    lines = np.moveaxis(image, axis, 0)
    reach = min(dilation, len(lines))
    result = 2.0 * lines
    result[reach:] += lines[: len(lines) - reach]
    result[:reach] += lines[0]
    result[: len(lines) - reach] += lines[reach:]
    result[len(lines) - reach :] += lines[-1]
    result *= np.float32(0.25)
    return np.moveaxis(result, 0, axis)


def _statistics(image: Image) -> tuple[Image, Image]:
    mean = image.mean(axis=(2, 3), keepdims=True, dtype=np.float64)
    variance = image.var(axis=(2, 3), keepdims=True, ddof=1, dtype=np.float64)
    return mean.astype(np.float32), np.sqrt(variance + ADAIN_EPS).astype(np.float32)
