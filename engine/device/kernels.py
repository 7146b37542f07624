"""A sampler's table on the device, what the three kernels of a step do with a row of it, and the kernels of tiles.

The host computes the table before the loop and uploads it whole. The device keeps the number of the
step, so every step is the same work and can be recorded once and replayed:

    prepare_step   x += churn · noise; the networks' input, timestep and control scale
    combine_step   x and, where the next step wants it, the denoised estimate, as weighted sums
    advance_step   the next row

`engine.sampling.sampler.sample` is their oracle: sums run over the same terms in the same order, in float32
and without fused multiplications, so that the results are the same bits.

For an image in tiles (`engine.sampling.tiling`), the device keeps the number of the tile too:

    clear            the image that tiles are added to
    take_tile        the tile's part of an image, once for each text
    add_tile         the part, weighted, to the image; one tile after the other, in the host's order
    advance_tile     the next one, and behind the last the first
"""

from __future__ import annotations

from importlib import resources

import numpy as np
from numpy.typing import NDArray

from engine.sampling.sampler import Step, StepTable

KERNELS = (
    "prepare_step",
    "combine_step",
    "advance_step",
    "clear",
    "take_tile",
    "add_tile",
    "advance_tile",
)
#: Terms of a step's sums, in the order in which they are added.
DENOISED_TERMS = ("x", "pos", "neg", "center")
UPDATE_TERMS = ("x", "pos", "neg", "center", "noise", "previous")
#: A row of the table. `keep` tells whether the step's estimate is needed later.
COLUMNS = (
    "timestep",
    "input_scale",
    "control_scale",
    "churn",
    "keep",
    *(f"denoised_{term}" for term in DENOISED_TERMS),
    *(f"update_{term}" for term in UPDATE_TERMS),
)


def cuda_source() -> str:
    """Return the kernels in CUDA C++, behind the columns' numbers."""
    columns = "".join(f"#define {name.upper()} {index}\n" for index, name in enumerate(COLUMNS))
    source = (resources.files("engine.device") / "step_kernels.cu").read_text()
    return f"{columns}#define COLUMNS {len(COLUMNS)}\n{source}"


def pack_table(table: StepTable, *, keep_all: bool = False) -> NDArray[np.float32]:
    """Return f32[steps, len(COLUMNS)]; see `engine.device.kernels`.

    Args:
        table: of the sampler.
        keep_all: whether every step keeps its estimate, not only those whose next step needs it.
    """
    return np.array([_row(table, step, keep_all) for step in table.steps], dtype=np.float32)


def _row(table: StepTable, step: Step, keep_all: bool) -> list[float]:
    return [
        step.timestep,
        step.input_scale,
        step.control_scale,
        step.churn,
        keep_all or table.keeps_denoised(step.index),
        *(getattr(step.denoised, term) for term in DENOISED_TERMS),
        *(getattr(step.update, term) for term in UPDATE_TERMS),
    ]
