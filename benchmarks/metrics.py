"""How like the truth a picture is, and how sharp: what PSNR, which rewards blur, does not see.

HaarPSI, GMSD and MDSI are written here by their papers' formulas: piq, which has them, imports torchvision, and
PyPI's builds of that do not import beside a CPU build of torch. The tests hold piq's values. All functions take
f32[H, W, 3] in [0, 1], the truth first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

Rgb = NDArray[np.float32]
Plane = NDArray[np.float64]

#: Octaves of the spectrum by name, in cycles per pixel; half a cycle is the finest that pixels can hold.
BANDS = {"coarse": (1 / 16, 1 / 8), "middle": (1 / 8, 1 / 4), "fine": (1 / 4, 1 / 2)}
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_LHM = ((0.2989, 0.5870, 0.1140), (0.30, 0.04, -0.35), (0.34, -0.60, 0.17))
_EDGES_PERCENTILE = 90
_ROUNDING = 1 / 255**2 / 12  # the variance that rounding to 8 bits adds


def haarpsi(truth: Rgb, found: Rgb) -> float:
    """Return the Haar wavelet-based perceptual similarity index: 1 for equal pictures, 0 for unlike ones.

    Source: Reisenhofer et al., arXiv 1607.06140, with its constants, for colour.
    """
    constant, slope = 30.0, 4.2
    one, two = (_halved(_planes(rgb, _YIQ) * 255) for rgb in (truth, found))
    similarities, weights = [], []
    for axis in (0, 1):
        scales = [(np.abs(_haar(one[0], side, axis)), np.abs(_haar(two[0], side, axis))) for side in (2, 4, 8)]
        similarities.append((_similarity(*scales[0], constant) + _similarity(*scales[1], constant)) / 2)
        weights.append(np.maximum(*scales[2]))
    colours = _similarity(np.abs(_box(one[1:], 2)), np.abs(_box(two[1:], 2)), constant)
    similarities.append(colours.mean(axis=0))
    weights.append((weights[0] + weights[1]) / 2)
    weight = np.sum(weights)
    if weight == 0:  # two flat pictures: nothing that wavelets see
        return float(np.mean(similarities[2]))
    squeezed = np.sum(weights / (1 + np.exp(-slope * np.stack(similarities)))) / weight
    return float((np.log(squeezed / (1 - squeezed)) / slope) ** 2)


def gmsd(truth: Rgb, found: Rgb) -> float:
    """Return the gradient magnitude similarity deviation: 0 for equal pictures, more for less alike ones.

    Source: Xue et al., arXiv 1308.3052, with its constant.
    """
    one, two = (_gradient(_halved(_planes(rgb, _YIQ[:1]) * 255)[0]) for rgb in (truth, found))
    return float(np.std(_similarity(one, two, 170.0)))


def mdsi(truth: Rgb, found: Rgb) -> float:
    """Return the mean deviation similarity index: 0 for equal pictures, more for less alike ones.

    Source: Nafchi et al., arXiv 1608.07433, its sum with its constants, in the pixels' domain.
    """
    every = max(1, round(min(truth.shape[:2]) / 256))
    pair = [_box(_planes(rgb, _LHM) * 255, every)[:, ::every, ::every] for rgb in (truth, found)]
    one, two, middle = (_gradient(planes[0]) for planes in (*pair, (pair[0] + pair[1]) / 2))
    # Not symmetric: what the judged picture has in common with both counts, what the truth has is taken off.
    gradients = _similarity(one, two, 140.0) + _similarity(two, middle, 55.0) - _similarity(one, middle, 55.0)
    (h_1, m_1), (h_2, m_2) = (planes[1:] for planes in pair)
    colours = (2 * (h_1 * h_2 + m_1 * m_2) + 550) / (h_1**2 + h_2**2 + m_1**2 + m_2**2 + 550)
    root = (0.6 * gradients + 0.4 * colours).astype(np.complex128) ** 0.25
    return float(np.mean(np.abs(root - root.mean())) ** 0.25)


def edge_sharpness(truth: Rgb, found: Rgb) -> float:
    """Return how steep the truth's edges still are: 1 as in the truth, 0 gone, over 1 sharpened.

    The luminance's gradient in the direction of the truth's, over the truth's own, by least squares on
    the tenth of the truth's pixels with the steepest gradient. Noise and edges elsewhere add nothing.
    """
    given, kept = (np.stack(np.gradient(_planes(rgb, _YIQ[:1])[0])) for rgb in (truth, found))
    steep = np.hypot(*given)
    edges = steep >= np.percentile(steep, _EDGES_PERCENTILE)
    least = _ROUNDING * np.count_nonzero(edges)  # of a truth without edges
    return float((np.sum((given * kept)[:, edges]) + least) / (np.sum((given**2)[:, edges]) + least))


def detail_energy(truth: Rgb, found: Rgb) -> dict[str, float]:
    """Return the spectrum's energy over the truth's in each of `BANDS`, in dB: 0 as much, -3 half of it.

    Of the luminance behind a Hann window, over rings of frequencies; to both is added what rounding
    to 8 bits adds to a picture. It says how much detail there is, right or wrong: noise has much.
    """
    powers = []
    for rgb in (truth, found):
        plane = _planes(rgb, _YIQ[:1])[0]
        window = np.outer(np.hanning(plane.shape[0]), np.hanning(plane.shape[1]))
        powers.append(np.abs(np.fft.fft2((plane - plane.mean()) * window)) ** 2 + _ROUNDING * np.sum(window**2))
    radius = np.hypot(np.fft.fftfreq(plane.shape[0])[:, None], np.fft.fftfreq(plane.shape[1])[None])
    energies = {}
    for name, (low, high) in BANDS.items():
        ring = (radius >= low) & (radius < high)
        energies[name] = float(10 * np.log10(powers[1][ring].sum() / powers[0][ring].sum()))
    return energies


def _planes(rgb: Rgb, matrix: Any) -> Plane:
    """Return f64[C, H, W] of f32[H, W, 3]: each channel a row of the matrix."""
    return np.einsum("cr,hwr->chw", np.asarray(matrix, np.float64), rgb.astype(np.float64))


def _halved(planes: Plane) -> Plane:
    """Return planes at half their size, means of 2 × 2 pixels; a missing last row or column is zero."""
    _, height, width = planes.shape
    rest = max(height % 2, width % 2)
    planes = np.pad(planes, ((0, 0), (0, rest), (0, rest)))
    height, width = (height + rest) // 2, (width + rest) // 2
    return planes[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2).mean(axis=(2, 4))


def _box(planes: Plane, side: int) -> Plane:
    """Return the means of squares, zero beyond the border, one square per pixel."""
    return _along(_along(planes, np.full(side, 1 / side), -2), np.full(side, 1 / side), -1)


def _haar(plane: Plane, side: int, axis: int) -> Plane:
    """Return a Haar wavelet's response of a size, across an axis."""
    step = np.repeat([1.0, -1.0], side // 2)
    return _along(_along(plane, step, axis), np.full(side, 1 / side), 1 - axis)


def _along(planes: Plane, filter_1d: NDArray[np.float64], axis: int) -> Plane:
    # An even filter's middle is the pixel before its centre.
    return correlate1d(planes, filter_1d, axis=axis, mode="constant", origin=-1 if len(filter_1d) % 2 == 0 else 0)


def _gradient(plane: Plane) -> Plane:
    """Return the magnitude of Prewitt's gradient, zero beyond the border."""
    third, difference = np.full(3, 1 / 3), np.array([-1.0, 0.0, 1.0])
    return np.hypot(*(_along(_along(plane, difference, axis), third, 1 - axis) for axis in (0, 1)))


def _similarity(one: Plane, other: Plane, constant: float) -> Plane:
    return (2 * one * other + constant) / (one**2 + other**2 + constant)
