import numpy as np
import pytest
from golden import assert_golden
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ScheduleError
from engine.sampling.schedule import karras_sigmas, nearest_level, trailing_sigmas, train_sigmas


def test_train_sigmas_match_reference(reference):
    assert_golden(train_sigmas(), reference["schedule/train_sigmas"], 1e-7)


@pytest.mark.parametrize("steps", [4, 8, 15, 50])
def test_trailing_sigmas_match_reference(reference, steps):
    assert_golden(trailing_sigmas(steps), reference[f"schedule/edm_{steps}"], 1e-7)


@given(st.integers(0, 999))
def test_sigma_and_timestep_round_trip(timestep):
    level = nearest_level(float(train_sigmas()[timestep]))
    assert (level.timestep, level.sigma) == (timestep, float(train_sigmas()[timestep]))


@given(st.floats(1e-3, 100.0))
def test_nearest_level_is_nearest(sigma):
    distances = np.abs(train_sigmas() - sigma)
    assert abs(nearest_level(sigma).sigma - sigma) == distances.min()


def test_sigma_above_the_schedule_is_its_last_level():
    assert nearest_level(20.0).timestep == 999


@pytest.mark.parametrize("grid", [trailing_sigmas, karras_sigmas])
@given(steps=st.integers(1, 1000))
def test_grids_descend_from_the_top_to_zero(grid, steps):
    sigmas = grid(steps)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == pytest.approx(train_sigmas()[-1], rel=1e-12)
    assert sigmas[-1] == 0.0
    assert (np.diff(sigmas) < 0).all()


def test_karras_spacing_is_even_in_the_seventh_root():
    roots = karras_sigmas(8)[:-1] ** (1 / 7)
    assert np.ptp(np.diff(roots)) < 1e-12


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ScheduleError, match="impossible number of steps"):
        trailing_sigmas(steps)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_sigma_is_refused(sigma):
    with pytest.raises(ScheduleError, match="positive and finite"):
        nearest_level(sigma)
