import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.image.preprocess import result_size, working_size

sides = st.integers(1, 5000)


@given(sides, sides, st.floats(0.1, 8))
def test_result_is_the_photo_times_upscale(width, height, upscale):
    for side, scaled in zip((width, height), result_size((width, height), upscale), strict=True):
        assert scaled >= 1
        assert abs(scaled - side * upscale) <= 0.5 or scaled == 1


@given(sides, sides, st.sampled_from([64, 256, 1024]), st.sampled_from([32, 64]))
def test_working_size_is_large_enough_whole_and_of_the_same_shape(width, height, min_size, multiple):
    worked = working_size((width, height), min_size, multiple)
    assert all(side % multiple == 0 for side in worked)
    assert min(worked) >= min_size
    scale = max(1.0, min_size / min(width, height))
    for side, found in zip((width, height), worked, strict=True):
        assert abs(found - side * scale) <= multiple / 2 + 0.5


@pytest.mark.parametrize(
    ("size", "min_size", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((600, 400), 1024, (1536, 1024)),
        ((1, 1), 64, (64, 64)),
        ((2000, 1500), 1024, (1984, 1472)),  # 31.25 and 23.44 multiples of 64
        ((1, 5000), 64, (64, 320000)),
    ],
)
def test_working_size_examples(size, min_size, expected):
    assert working_size(size, min_size, 64) == expected
