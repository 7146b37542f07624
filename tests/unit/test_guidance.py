import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling.guidance import SIGMA_MAX, Ramp, RestorationPull, is_unguided

scales = st.floats(-20, 20)


@given(scales, scales)
def test_ramp_goes_from_start_to_end(start, end):
    ramp = Ramp(start, end)
    assert ramp(SIGMA_MAX) == pytest.approx(start)
    assert ramp(0.0) == pytest.approx(end)
    assert ramp(SIGMA_MAX / 2) == pytest.approx((start + end) / 2)


@given(scales, st.floats(0, 30))
def test_flat_ramp_is_exact(scale, sigma):
    assert Ramp(scale, scale)(sigma) == scale


def test_ramp_stays_linear_above_the_schedule():
    assert Ramp(2.0, 1.0)(2 * SIGMA_MAX) == pytest.approx(3.0)


def test_pull_fades_with_sigma_and_ends_before_the_last_step():
    pull = RestorationPull(4.0)
    assert pull(SIGMA_MAX, 10.0) == pytest.approx(1.0)
    assert pull(SIGMA_MAX / 2, 5.0) == pytest.approx(1 / 16)
    assert pull(1.0, 0.05) == 0.0
    assert pull(1.0, 0.0) == 0.0


@pytest.mark.parametrize("power", [None, 0.0, -1.0])
def test_pull_can_be_off(power):
    assert RestorationPull(power)(SIGMA_MAX, 10.0) == 0.0


@pytest.mark.parametrize(("scale", "unguided"), [(1.0, True), (1.00009, True), (1.00011, False), (0.0, False)])
def test_scale_near_one_needs_no_negative_pass(scale, unguided):
    assert is_unguided(scale) is unguided
