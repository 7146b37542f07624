from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="needs the build extra")

from engine.bundle.hashing import hash_file
from engine.errors import BuildError, CheckpointError, OutputError
from export.build.weights import Weight, plan_layout, write_weights
from export.checkpoint.lora import LoadedLora
from export.checkpoint.safetensors_file import read_safetensors
from export.checkpoint.tensor_files import LazyTensor
from export.graphs.definitions import NUMPY_DTYPES

WANTED = [
    Weight("odd", "float32", (3,)),
    Weight("matrix", "float16", (32, 64)),
    Weight("brain", "bfloat16", (64, 32)),
    Weight("kernel", "float32", (16, 4, 3, 3)),
]


def sources(**changes):
    generator = np.random.default_rng(0)
    values = {weight.name: generator.standard_normal(weight.shape, np.float32) for weight in WANTED}
    values |= changes
    return {
        name: LazyTensor(name, Path("base.safetensors"), tuple(v.shape), lambda v=v: v) for name, v in values.items()
    }


def test_file_is_plain_safetensors_with_cast_values(tmp_path):
    path, layout = tmp_path / "w.safetensors", plan_layout(WANTED)
    done = []
    digest = write_weights(path, layout, sources(), [], done.append)
    assert digest == hash_file(path)
    assert layout.bytes == path.stat().st_size
    assert sum(done) == sum(weight.bytes for weight in WANTED)
    stored = read_safetensors(path)
    for weight in WANTED:
        expected = sources()[weight.name].read().astype(NUMPY_DTYPES[weight.dtype])
        assert stored[weight.name].dtype == expected.dtype
        assert np.array_equal(stored[weight.name].read(), expected)


def test_offsets_point_at_the_values(tmp_path):
    path, layout = tmp_path / "w.safetensors", plan_layout(WANTED)
    write_weights(path, layout, sources(), [])
    raw = path.read_bytes()
    for weight in layout.weights.values():
        found = np.frombuffer(raw[weight.offset : weight.offset + weight.bytes], NUMPY_DTYPES[weight.dtype])
        assert np.array_equal(found.reshape(weight.shape), sources()[weight.name].read().astype(found.dtype))
    aligned = [weight.offset % 64 == 0 for weight in layout.weights.values() if weight.bytes % 64 == 0]
    assert aligned
    assert all(aligned)


def test_merging_comes_before_the_cast(tmp_path):
    class Delta:
        def add_to(self, merged, base, scale):
            merged += scale * 1e-4

    lora = LoadedLora("l", Path("l"), 2.0, {"matrix": Delta()})
    base = sources(matrix=np.ones((32, 64), np.float16))
    path, layout = tmp_path / "w.safetensors", plan_layout([Weight("matrix", "float32", (32, 64))])
    write_weights(path, layout, base, [lora])
    # In float16, 1 + 0.0002 would have been 1.
    assert np.allclose(read_safetensors(path)["matrix"].read(), 1.0002, rtol=0, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    broken = np.zeros((32, 64), np.float32)
    broken[5, 5] = value
    with pytest.raises(CheckpointError, match=r"base\.safetensors: matrix: .*not finite"):
        write_weights(tmp_path / "w.safetensors", plan_layout(WANTED), sources(matrix=broken), [])


def test_values_too_large_for_the_precision_are_named(tmp_path):
    huge = sources(matrix=np.full((32, 64), 7e4, np.float32))
    with pytest.raises(BuildError, match=r"(?s)matrix: a weight does not fit float16.*7e\+04.*--precision bf16"):
        write_weights(tmp_path / "w.safetensors", plan_layout(WANTED), huge, [])


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(OutputError, match="cannot write the weights: no such folder"):
        write_weights(tmp_path / "missing" / "w.safetensors", plan_layout(WANTED), sources(), [])
