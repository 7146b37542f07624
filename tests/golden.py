"""Golden comparison that proves, each time, that it would notice a wrong result."""

from __future__ import annotations

import numpy as np


def relative_l2(actual, expected) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def assert_golden(actual, expected, bound: float) -> None:
    """Assert that `actual` is `expected` up to `bound`, and that zeros or shuffled values are not."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = relative_l2(actual, expected)
    assert error <= bound, f"relative L2 {error:.3g}, allowed {bound:g}"
    shuffled = np.random.default_rng(0).permutation(actual.reshape(-1)).reshape(actual.shape)
    for name, wrong in (("zeros", np.zeros_like(actual)), ("a shuffled result", shuffled)):
        assert relative_l2(wrong, expected) > 100 * bound, f"{name} would pass"


def in_the_last_bit_of(frequencies, vector):
    """Return the frequencies, each with the last bit that the reference's own machine gave it.

    The reference's exp rounded some of them otherwise; times 1024, that shows in the sixth digit.
    """
    first = vector[-6 * 2 * len(frequencies) :].reshape(6, 2, -1)[0].astype(np.float64)
    ours = np.float32(frequencies)
    near = np.stack([ours, np.nextafter(ours, np.float32(0)), np.nextafter(ours, np.float32(2))])
    angles = (np.float32(1024) * near).astype(np.float64)
    errors = np.abs(np.cos(angles) - first[0]) + np.abs(np.sin(angles) - first[1])
    return tuple(near[errors.argmin(axis=0), np.arange(len(ours))])
