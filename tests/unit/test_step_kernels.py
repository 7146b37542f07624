"""The kernels' source, and the table as they read it."""

import numpy as np
import pytest

from engine.device import cuda
from engine.device.kernels import COLUMNS, KERNELS, cuda_source, pack_table
from engine.errors import BackendError
from engine.sampling.guidance import Ramp, RestorationPull
from engine.sampling.sampler import dpmpp2m_table, edm_table
from engine.sampling.schedule import karras_sigmas, nearest_level, trailing_sigmas


def quantize(sigma):
    level = nearest_level(sigma)
    return level.timestep, level.sigma


COMMON = {
    "quantize": quantize,
    "cfg_scale": Ramp(3.0, 1.5),
    "control_scale": Ramp(1.0, 0.5),
    "pull": RestorationPull(4.0),
}


def column(packed, name):
    return packed[:, COLUMNS.index(name)]


def test_a_row_says_what_its_step_says():
    table = edm_table(trailing_sigmas(6), churn=1.0, **COMMON)
    packed = pack_table(table)
    assert packed.dtype == np.float32
    assert packed.shape == (6, len(COLUMNS))
    for name in ("timestep", "input_scale", "control_scale", "churn"):
        assert np.array_equal(column(packed, name), np.float32([getattr(step, name) for step in table.steps]))
    for sums in ("denoised", "update"):
        for term in ("x", "pos", "neg", "center"):
            expected = np.float32([getattr(getattr(step, sums), term) for step in table.steps])
            assert np.array_equal(column(packed, f"{sums}_{term}"), expected)


def test_estimates_are_kept_where_the_next_step_or_somebody_wants_them():
    table = dpmpp2m_table(karras_sigmas(6), **COMMON)
    assert list(column(pack_table(table), "keep")) == [1, 1, 1, 1, 0, 0]
    assert list(column(pack_table(table, keep_all=True), "keep")) == [1] * 6


def test_the_source_knows_every_column_by_its_number():
    source = cuda_source()
    for index, name in enumerate(COLUMNS):
        assert f"#define {name.upper()} {index}\n" in source
        assert f"[{name.upper()}]" in source
    for kernel in KERNELS:
        assert f"void {kernel}(" in source


@pytest.mark.parametrize("architecture", ["sm_75", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_nvrtc_compiles_them_without_a_gpu(architecture):
    pytest.importorskip("cuda.core", reason="needs the cuda extra")
    assert len(cuda.compile_kernels(architecture).code) > 1000


def test_a_compiler_that_refuses_them_is_told(monkeypatch):
    pytest.importorskip("cuda.core", reason="needs the cuda extra")
    monkeypatch.setattr(cuda, "cuda_source", lambda: "this is no code")
    with pytest.raises(BackendError, match="the GPU could not compile the sampler's kernels"):
        cuda.compile_kernels("sm_89")
