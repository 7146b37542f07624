"""Gaussian noise as a field: a value for every seed, draw, channel and place.

A value depends on nothing else: not on the batch, the size of the image, the order of drawing, a
tile or the backend. Philox is a counter-based generator, so a place is simply a counter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_TO_UNIT = 2.0**-32


def noise_field(seed: int, draw: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Return the corner of the standard normal field number `draw` of `seed`; a larger one continues it.

    Args:
        seed: 0 … 2^63 - 1, one per image.
        draw: which field: 0 is the starting noise, 1 + i is that of step i.
        shape: (C, h, w) in latent cells.
    Returns:
        f32[C, h, w], mean 0, variance 1.
    Source: Philox (Salmon et al., SC 2011); Box-Muller on the halves of each 64-bit value.
    """
    channels, height, width = shape
    raw = np.empty((channels, height, width), dtype=np.uint64)
    for channel in range(channels):
        for row in range(height):
            raw[channel, row] = np.random.Philox(key=seed, counter=[0, row, channel, draw]).random_raw(width)
    # (0, 1], so that the logarithm is finite; 32 bits reach 6.7 standard deviations.
    radius = np.sqrt(-2.0 * np.log(((raw >> np.uint64(32)).astype(np.float64) + 1.0) * _TO_UNIT))
    angle = 2.0 * np.pi * (raw & np.uint64(0xFFFFFFFF)).astype(np.float64) * _TO_UNIT
    return (radius * np.cos(angle)).astype(np.float32)


def batch_noise(seeds: Sequence[int], draw: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Return f32[B, C, h, w]: the field `draw` of each image's own seed."""
    return np.stack([noise_field(seed, draw, shape) for seed in seeds])


def noise_source(
    seeds: Sequence[int],
    shape: Sequence[int],
    noise: NDArray[np.float32] | None,
    step_noise: NDArray[np.float32] | None = None,
) -> Callable[[int], NDArray[np.float32]]:
    """Return the function from a draw to its field f32[B,C,h,w]: given noise, or else the seeds'."""

    def draw(number: int) -> NDArray[np.float32]:
        if number == 0 and noise is not None:
            return noise
        if number > 0 and step_noise is not None:
            return step_noise[number - 1]
        return batch_noise(seeds, number, shape)

    return draw
