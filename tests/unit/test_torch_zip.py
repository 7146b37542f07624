"""Files that torch writes: what is read without torch is what torch itself reads."""

import os
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from engine.errors import CheckpointError
from export.checkpoint.torch_zip import is_torch_zip, read_torch_zip

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
NEW = [
    torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.ckpt"


def every_bit(dtype, *shape):
    """Return a tensor of random bits, infinities and NaN among them."""
    size = torch.empty(shape, dtype=dtype).nbytes
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=torch.Generator().manual_seed(3))
    return bits.to(torch.uint8).view(dtype).reshape(shape)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        stored = found[name]
        array = stored.read()
        assert array.shape == stored.shape == tuple(tensor.shape)
        assert array.dtype == stored.dtype
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert not array.flags.writeable
        bits = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        assert array.tobytes() == bits.tobytes(), name


def assert_saved_and_read(path, content, expected=None, **options):
    torch.save(content, path, **options)
    assert is_torch_zip(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    assert_same(read_torch_zip(path), loaded if expected is None else expected(loaded))


@pytest.mark.parametrize("dtype", FLOATS + WHOLE + NEW, ids=str)
def test_every_type(path, dtype):
    tensors = {str(shape): every_bit(dtype, *shape) for shape in ((), (1,), (0,), (3, 0, 2), (7,), (2, 3, 4, 5))}
    assert_saved_and_read(path, tensors)


def test_views(path):
    whole = torch.arange(24.0).reshape(4, 6)
    views = {
        "transposed": whole.T,
        "rows": whole[1:3],
        "columns": whole[:, 2:5],
        "every other": whole[::2, 1::2],
        "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
        "repeated": torch.arange(4).expand(3, 4),
        "one value": torch.ones(1, 1).expand(5, 7),
        "of an axis of one": torch.arange(6.0)[2:3],
        "unfolded": torch.arange(6.0).unfold(0, 3, 1),
        "last in memory": torch.empty(2, 3, 4, 5).fill_(2).to(memory_format=torch.channels_last),
        "nothing of it": whole[4:],
    }
    assert_saved_and_read(path, views)
    read = read_torch_zip(path)
    assert np.shares_memory(read["rows"].read(), read["transposed"].read())


def test_tensors_of_one_storage(path):
    tensor = torch.randn(3, 3)
    assert_saved_and_read(path, {"a": tensor, "b": tensor, "c": tensor.view(9)})
    found = read_torch_zip(path)
    assert np.shares_memory(found["a"].read(), found["c"].read())


def module():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.LayerNorm(4))
    return torch.nn.ModuleDict({"first": layers, "second": torch.nn.Conv2d(3, 4, 3)})


def lightning_like(weights):
    """Return what a trainer saves around the weights, as far as torch's `weights_only` takes it."""
    net = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 2**40,
        "pytorch-lightning_version": "1.9.4",
        "state_dict": weights,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": -3, "verbose": False, "_last": (1, 2, 3, 4)}],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": None, "score": float("inf"), "text": "Größe 🙂"}},
        "hyper_parameters": OrderedDict(lr=1e-4, layers=[1, 2, 2, 10], names=("a", "b"), one=(1,), none=()),
        "ema": torch.zeros(2),
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: module().state_dict(), None),
        (lambda: dict(module().half().state_dict()), None),
        (lambda: dict(module().named_parameters()), None),
        (lambda: {"p": torch.nn.Parameter(torch.randn(3, 2).T, requires_grad=False)}, None),
        (lambda: OrderedDict(a=torch.ones(2)), None),
        (dict, None),
        (lambda: {f"t{number}": torch.full((2,), number) for number in range(600)}, None),
        (lambda: {"": torch.ones(1), "Ü\n🙂": torch.ones(1)}, None),
        (lambda: {"state_dict": module().state_dict()}, lambda loaded: loaded["state_dict"]),
        (lambda: lightning_like(module().state_dict()), lambda loaded: loaded["state_dict"]),
        (lambda: {"state_dict": torch.ones(2)}, None),
    ],
)
def test_what_programs_save(path, content, expected):
    assert_saved_and_read(path, content(), expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(path, protocol):
    """Later protocols than torch's own, which `weights_only` does not read."""
    torch.manual_seed(0)
    weights = module().state_dict()
    torch.save(lightning_like(weights), path, pickle_protocol=protocol)
    assert_same(read_torch_zip(path), weights)


def test_other_ways_to_save(path):
    weights = module().state_dict()
    with path.open("wb") as file:
        assert_saved_and_read(path, weights)
        torch.save(weights, file)
    assert_same(read_torch_zip(path), weights)
    checks = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(not checks)
    try:
        assert_saved_and_read(path, weights)
    finally:
        torch.serialization.set_crc32_options(checks)
    assert_saved_and_read(path, weights, _use_new_zipfile_serialization=True)
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert not is_torch_zip(path)
    with pytest.raises(CheckpointError, match="not a zip file of torch.save"):
        read_torch_zip(path)


def test_unaligned_storages(path):
    """A file that another program packed anew, without torch's padding."""
    weights = {f"{dtype}": every_bit(dtype, 5) for dtype in FLOATS + WHOLE}
    torch.save(weights, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for padding in range(8):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
                archive.writestr(f"{name}.{'x' * padding}", "")
        found = read_torch_zip(path)
        assert_same(found, weights)
        np.testing.assert_array_equal(
            found["torch.bfloat16"].read().astype(np.float32), weights["torch.bfloat16"].float().numpy()
        )


class Other:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: {"a": Other()}, r"could run any code(?s:.*)\.Other"),
        (lambda: {"state_dict": {"a": torch.ones(1)}, "config": Other()}, r"could run any code(?s:.*)\.Other"),
        (lambda: {"a": np.ones(2)}, "numpy.*_reconstruct"),
        (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda: {"a": torch.eye(4).to_sparse()}, "a sparse tensor"),
        (lambda: {"a": torch.eye(4).to_sparse_csr()}, "a sparse tensor"),
        (lambda: {"a": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)}, "a quantized tensor"),
        (lambda: {"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, "a nested tensor"),
        (lambda: {"a": torch.zeros(4, device="meta")}, "a tensor without values"),
        (lambda: {"a": torch.zeros(4, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
        (lambda: {"a": torch.zeros(4).untyped_storage()}, "a: the pickle holds more than tensors(?s:.*)Storage"),
        (lambda: {"a": torch._neg_view(torch.ones(2))}, "negated or conjugated"),
        (lambda: {"a": torch.ones(1), "b": 3}, "b: the pickle holds more than tensors(?s:.*)int"),
        (lambda: {"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "b: the pickle holds more than tensors(?s:.*)dict"),
        (lambda: {1: torch.ones(1)}, "1: a tensor's name is no text"),
        (lambda: [torch.ones(1)], "not a dictionary of tensors(?s:.*)list"),
        (lambda: torch.ones(1), "not a dictionary of tensors(?s:.*)Tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_dictionary_of_plain_tensors(path, content, message):
    torch.save(content(), path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_zip(path)
    assert str(caught.value).startswith(str(path))


def test_reading_imports_no_torch_and_reads_no_storage(path):
    """A process that opens a file has neither torch nor the file in its memory."""
    torch.save({"a": torch.zeros(1 << 24), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    lines = (
        "import sys, time, resource",
        "from pathlib import Path",
        "from export.checkpoint.torch_zip import read_torch_zip",
        "import export.checkpoint.safetensors_file",
        "begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
        "found = read_torch_zip(Path(sys.argv[1]))",
        "assert found['a'].read()[1 << 23] == 0 and found['b'].read().sum() == 3",
        "more_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before",
        "print(time.perf_counter() - begin, more_kib, [name for name in sys.modules if name.startswith('torch')])",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    match = re.fullmatch(r"(\S+) (\d+) \[\]\n", done.stdout)
    assert match, done.stdout
    assert float(match[1]) < 1
    assert int(match[2]) < 16 << 10
