import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling.noise import batch_noise, noise_field

SHAPE = (4, 24, 40)


@given(height=st.integers(1, SHAPE[1]), width=st.integers(1, SHAPE[2]))
def test_a_smaller_field_is_the_corner_of_a_larger_one(height, width):
    assert np.array_equal(noise_field(7, 3, (4, height, width)), noise_field(7, 3, SHAPE)[:, :height, :width])


def test_field_does_not_depend_on_the_batch_or_its_order():
    batch = batch_noise([5, 9], 0, SHAPE)
    assert np.array_equal(batch[0], noise_field(5, 0, SHAPE))
    assert np.array_equal(batch[1], noise_field(9, 0, SHAPE))


def test_field_is_standard_normal():
    field = noise_field(0, 0, (4, 256, 256)).astype(np.float64)
    count = field.size
    assert abs(field.mean()) < 4 / np.sqrt(count)
    assert abs(field.var() - 1) < 4 * np.sqrt(2 / count)
    assert abs((field**4).mean() - 3) < 4 * np.sqrt(96 / count)
    assert abs((field[:, :, 1:] * field[:, :, :-1]).mean()) < 4 / np.sqrt(count)
    assert abs((field[:, 1:] * field[:, :-1]).mean()) < 4 / np.sqrt(count)


def test_seeds_draws_and_channels_are_independent():
    fields = [noise_field(seed, draw, SHAPE) for seed in (0, 1, 2**63 - 1) for draw in (0, 1)]
    planes = [plane.reshape(-1) for field in fields for plane in field]
    correlation = np.corrcoef(planes) - np.eye(len(planes))
    assert np.abs(correlation).max() < 5 / np.sqrt(planes[0].size)


def test_values_are_the_same_for_ever():
    # Settings in a file's metadata promise that its seed gives the same picture again.
    expected = [2.9162033, -1.2855403, -1.3901572, 0.41330153]
    assert np.allclose(noise_field(0, 0, (1, 1, 4)).reshape(-1), expected, atol=1e-6)
