"""What a latent looks like without a decoder: colours by cell, fitted on the photo that is being restored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.image.photo import Pixels
from engine.pipeline.executor import Listener, OnStep
from engine.sampling.sampler import Latent, StepOutput

#: Cells a side at most, in the fit and in a picture: as many as a small picture shows.
_MAX_SIDE = 192


@dataclass(frozen=True)
class LatentColors:
    """A linear map from a cell's channels to its colour.

    A VAE's latents hold colour almost linearly. The photo gives both sides, its latent and its pixels, so that the
    map needs no constants, which would be those of one VAE.

    Attributes:
        weights: f64[C + 1, 3]; the last row is the constant.
    """

    weights: NDArray[np.float64]

    @classmethod
    def fit(cls, z: Latent, colors: Pixels) -> LatentColors:
        """Return the map that is best in the sense of least squares.

        Args:
            z: f32[B,C,h,w], of the degraded photos.
            colors: f32[B,3,h,w], from `cell_colors`.
        """
        channels = _rows(_thinned(z))
        targets = _rows(_thinned(colors))
        known = np.concatenate([channels, np.ones((len(channels), 1))], axis=1)
        # By the normal equations: of the tall matrix itself, OpenBLAS's threads would make work of a tenth of a second.
        return cls(np.linalg.lstsq(known.T @ known, known.T @ targets, rcond=None)[0])

    def picture(self, z: Latent) -> Pixels:
        """Return a latent's colours, f32[B,h,w,3] in [0, 1]; large ones are thinned out."""
        small = _thinned(z)
        colors = _rows(small) @ self.weights[:-1] + self.weights[-1]
        shape = (small.shape[0], *small.shape[2:], 3)
        return (colors.reshape(shape) * 0.5 + 0.5).clip(0.0, 1.0).astype(np.float32)


def cell_colors(pixels: Pixels, cell: int) -> Pixels:
    """Return the mean colour of each cell, f32[B,3,h,w], of pixels f32[B,3,h·cell,w·cell] in [-1, 1]."""
    batch, channels, height, width = pixels.shape
    return pixels.reshape(batch, channels, height // cell, cell, width // cell, cell).mean((3, 5))


def showing(listener: Listener, z_lq: Latent, colors: Pixels) -> OnStep:
    """Return what a step is told to where estimates are shown: the step's listener, and then the picture's.

    Args:
        listener: with an `on_estimate`.
        z_lq, colors: as for `LatentColors.fit`.
    """
    fitted, show = LatentColors.fit(z_lq, colors), listener.on_estimate
    assert show is not None

    def on_step(progress: StepOutput) -> None:
        listener.on_step(progress)
        assert progress.denoised is not None
        show(fitted.picture(progress.denoised))

    return on_step


def _thinned(values: NDArray[np.float32]) -> NDArray[np.float32]:
    stride = max(1, -(-max(values.shape[2:]) // _MAX_SIDE))
    return values[:, :, ::stride, ::stride]


def _rows(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return cells as rows, f64[B·h·w, C]."""
    return values.transpose(0, 2, 3, 1).reshape(-1, values.shape[1]).astype(np.float64)
