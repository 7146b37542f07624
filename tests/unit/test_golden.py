"""The comparison that golden tests rest on must itself notice what is wrong."""

import numpy as np
import pytest
from golden import assert_golden

EXPECTED = np.random.default_rng(0).standard_normal((3, 40))


def test_the_right_result_passes():
    assert_golden(EXPECTED * (1 + 1e-7), EXPECTED, 1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros_like(EXPECTED),
        np.random.default_rng(1).permutation(EXPECTED.reshape(-1)).reshape(EXPECTED.shape),
        EXPECTED[::-1],
        EXPECTED + 1e-5,
        EXPECTED[:2],
        np.where(EXPECTED > 2, np.nan, EXPECTED),
    ],
)
def test_a_wrong_result_fails(wrong):
    with pytest.raises(AssertionError):
        assert_golden(wrong, EXPECTED, 1e-6)


def test_a_bound_so_loose_that_zeros_would_pass_fails():
    with pytest.raises(AssertionError, match="would pass"):
        assert_golden(EXPECTED, EXPECTED, 0.5)
