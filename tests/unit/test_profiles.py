"""Sizes that plans are compiled for, and which of them an input runs under."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bundle.graphspec import GraphSpec, TensorSpec, resolve
from engine.bundle.profiles import Profile, Range, choose_profile
from engine.errors import BackendError, UsageError
from export.trt.shapes import MAX_CHUNKS, WorkShape, default_shapes, parse_shapes, profiles_for

UNET = GraphSpec(
    name="unet",
    role="denoiser",
    precision="fp16",
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("B", 4, "h", "w")),
        TensorSpec(name="context", dtype="float16", shape=("B", "77*k", 2048)),
    ),
    outputs=(TensorSpec(name="eps", dtype="float32", shape=("B", 4, "h", "w")),),
    multiples={"h": 8, "w": 8},
)
TEXT = GraphSpec(
    name="text_encoder",
    role="text",
    precision="fp16",
    inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("B", 77)),),
    outputs=(TensorSpec(name="hidden", dtype="float16", shape=("B", 77, 768)),),
)


def square(side):
    return WorkShape((side, side), (side, side))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", [square(512)]),
        ("512, 1024x768", [square(512), WorkShape((1024, 1024), (768, 768))]),
        ("256-2048,512", [square(512), WorkShape((256, 2048), (256, 2048))]),
        ("512,512", [square(512)]),
    ],
)
def test_a_list_of_sizes_is_read_static_ones_first(text, expected):
    assert parse_shapes(text) == tuple(expected)


@pytest.mark.parametrize(
    "text", ["", "0", "512x", "x512", "512-256", "-512", "9000", "512;1024", "1e3", "５１２", "5.5"]
)
def test_what_is_no_list_of_sizes_is_refused(text):
    with pytest.raises(UsageError, match="--shapes"):
        parse_shapes(text)


def test_a_static_size_is_one_photo_and_one_chunk_of_text_at_a_time():
    static, wide = profiles_for(UNET, parse_shapes("1024x512,64-2048"), 4, 8)
    assert static.ranges == {"B": (1, 2, 2), "h": (64, 64, 64), "w": (128, 128, 128), "k": (1, 1, 1)}
    assert wide.ranges == {"B": (1, 2, 8), "h": (8, 128, 256), "w": (8, 128, 256), "k": (1, 1, MAX_CHUNKS)}
    assert list(static.ranges) == list(UNET.symbols)


def test_text_towers_have_one_profile_whatever_the_sizes():
    assert len(profiles_for(TEXT, parse_shapes("512,1024,64-2048"), 4, 8)) == 1


def test_a_side_that_the_graph_cannot_work_in_is_refused():
    with pytest.raises(UsageError, match="multiples of 64"):
        profiles_for(UNET, parse_shapes("500"), 1, 8)


@given(st.integers(1, 32), st.integers(1, 32), st.integers(1, 2), st.integers(1, 3))
def test_the_first_profile_that_holds_a_size_is_chosen_and_no_other_size_runs(height, width, rows, chunks):
    profiles = profiles_for(UNET, parse_shapes("128,64-192"), 1, 8)
    symbols = {"B": rows, "h": 8 * height, "w": 8 * width, "k": chunks}
    inside = max(height, width) <= 3
    if not inside:
        with pytest.raises(BackendError, match=f"h = {8 * height}"):
            choose_profile(profiles, symbols, where="unet")
        return
    chosen = choose_profile(profiles, symbols, where="unet")
    assert chosen == (0 if (height, width, chunks) == (2, 2, 1) else 1)
    for tensor in UNET.inputs:  # what the library is told
        least, found, most = (
            resolve(tensor.shape, at) for at in (profiles[chosen].at("min"), symbols, profiles[chosen].at("max"))
        )
        assert all(low <= size <= high for low, size, high in zip(least, found, most, strict=True))


def test_the_default_holds_what_a_bundle_works_at():
    profiles = profiles_for(UNET, default_shapes(1024), 1, 8)
    assert choose_profile(profiles, {"B": 2, "h": 128, "w": 128, "k": 1}, where="unet") == 0
    assert choose_profile(profiles, {"B": 2, "h": 128, "w": 192, "k": 2}, where="unet") == 1


def test_a_profile_reads_as_a_person_would_write_it():
    assert str(Profile(ranges={"B": Range(1, 2, 4), "h": Range(64, 64, 64)})) == "B = 1 … 4, h = 64"
