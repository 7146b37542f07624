from fractions import Fraction

import pytest

from engine.bundle.graphspec import GraphSpec, TensorSpec, parse_axis, resolve
from engine.errors import BackendError

SPEC = GraphSpec(
    name="unet",
    role="denoiser",
    precision="fp32",
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("B", 4, "h", "w")),
        TensorSpec(name="context", dtype="float32", shape=("B", "77*k", 192)),
        TensorSpec(name="control_3", dtype="float32", shape=("B", 32, "h/2", "w/2")),
    ),
    outputs=(TensorSpec(name="eps", dtype="float32", shape=("B", 4, "h", "w")),),
    multiples={"h": 8, "w": 8},
)
GOOD = {
    "x": ("float32", (2, 4, 16, 24)),
    "context": ("float32", (2, 154, 192)),
    "control_3": ("float32", (2, 32, 8, 12)),
}


@pytest.mark.parametrize(
    ("axis", "expected"),
    [(4, (None, 4)), ("B", ("B", 1)), ("77*k", ("k", 77)), ("h/2", ("h", Fraction(1, 2)))],
)
def test_axes_are_symbols_with_a_ratio(axis, expected):
    assert parse_axis(axis) == expected


@pytest.mark.parametrize("axis", ["", "2*", "h*2", "h/0.5", "h+w", "-1"])
def test_anything_else_is_no_axis(axis):
    with pytest.raises(ValueError, match="not an axis"):
        parse_axis(axis)


def test_inputs_bind_the_symbols_that_outputs_are_made_of():
    symbols = SPEC.bind(GOOD)
    assert symbols == {"B": 2, "h": 16, "w": 24, "k": 2}
    assert resolve(SPEC.outputs[0].shape, symbols) == (2, 4, 16, 24)
    assert SPEC.symbols == ("B", "h", "w", "k")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ("float64", (2, 4, 16, 24))}, r"unet\.x: wrong dtype"),
        ({"x": ("float32", (2, 3, 16, 24))}, r"unet\.x: wrong shape"),
        ({"x": ("float32", (2, 4, 16))}, r"unet\.x: wrong shape"),
        ({"x": ("float32", (2, 4, 12, 24))}, r"h a multiple of 8"),
        ({"x": ("float32", (0, 4, 16, 24))}, r"unet\.x: wrong shape"),
        ({"context": ("float32", (3, 154, 192))}, r"unet\.context: wrong shape.*B = 2"),
        ({"context": ("float32", (2, 100, 192))}, r"unet\.context: wrong shape"),
        ({"control_3": ("float32", (2, 32, 16, 24))}, r"unet\.control_3: wrong shape"),
        ({"extra": ("float32", (1,))}, r"unet: wrong set of inputs"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(BackendError, match=f"(?s){message}"):
        SPEC.bind({**GOOD, **change})


def test_a_missing_input_is_named():
    with pytest.raises(BackendError, match="wrong set of inputs"):
        SPEC.bind({"x": GOOD["x"]})


def test_spec_survives_json():
    assert GraphSpec.model_validate_json(SPEC.model_dump_json()) == SPEC
