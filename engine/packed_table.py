"""A sampler's table as the step's kernels read it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.sampler import Step, StepTable
from engine.step_kernels import DENOISED_TERMS, UPDATE_TERMS


def noisy_steps(table: StepTable) -> tuple[int, ...]:
    """Return the steps that use noise, in the order in which their fields are uploaded."""
    return tuple(step.index for step in table.steps if step.uses_noise)


def pack_table(table: StepTable) -> NDArray[np.float32]:
    """Return f32[steps, len(COLUMNS)]; see `engine.step_kernels`."""
    draws = {index: draw for draw, index in enumerate(noisy_steps(table))}
    return np.array([_row(table, step, draws.get(step.index, 0)) for step in table.steps], dtype=np.float32)


def _row(table: StepTable, step: Step, draw: int) -> list[float]:
    return [
        step.timestep,
        step.input_scale,
        step.control_scale,
        step.churn,
        draw,
        table.keeps_denoised(step.index),
        *(getattr(step.denoised, term) for term in DENOISED_TERMS),
        *(getattr(step.update, term) for term in UPDATE_TERMS),
    ]
