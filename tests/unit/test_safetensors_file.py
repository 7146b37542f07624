import json
import os
import random
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the export extra")

from safetensors import safe_open

from engine.errors import CheckpointError
from export.checkpoint.safetensors_file import _DTYPES, metadata, read_safetensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def file_of(header, data=b"", *, pad=0, size=None):
    """Return a safetensors file; `pad` spaces behind the header move the tensors."""
    encoded = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b" " * pad
    return struct.pack("<Q", len(encoded) if size is None else size) + encoded + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def every_type(pad=0):
    """Return a file with random bits of every type, and the bits by name. No type but U8 is aligned."""
    random_, header, data, bits = random.Random(3), {}, b"\x07", {}
    header["first"] = entry("U8", [1], 0, 1)
    bits["first"] = ("U8", (1,), b"\x07")
    for dtype, kind in _DTYPES.items():
        for shape in ((), (3,), (2, 1, 3), (0, 2)):
            size = int(np.prod(shape)) * kind.itemsize
            value = random_.randbytes(size) if dtype != "BOOL" else bytes(random_.choices([0, 1], k=size))
            name = f"{dtype}{shape}"
            header[name] = entry(dtype, list(shape), len(data), len(data) + size)
            data += value
            bits[name] = (dtype, shape, value)
    return file_of({**header, "__metadata__": {"format": "pt", "größe": "1"}}, data, pad=pad), bits


def refusal(path, data):
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("pad", range(8))
def test_every_type_at_every_offset(path, pad):
    """Tensors need not be aligned, and NumPy then computes with them all the same."""
    data, bits = every_type(pad)
    path.write_bytes(data)
    found = read_safetensors(path)
    assert list(found) == list(bits)
    for name, (dtype, shape, value) in bits.items():
        array = found[name].read()
        assert (array.shape, array.dtype) == (found[name].shape, found[name].dtype) == (shape, _DTYPES[dtype])
        assert array.tobytes() == value
        assert not array.flags.writeable
        aligned = np.frombuffer(value, _DTYPES[dtype]).reshape(shape)
        with np.errstate(invalid="ignore", over="ignore"):
            np.testing.assert_array_equal(array.astype(np.complex128), aligned.astype(np.complex128))
            np.testing.assert_array_equal(array + array, aligned + aligned)


def test_the_library_agrees(path):
    data, bits = every_type()
    path.write_bytes(data)
    found = read_safetensors(path)
    with safe_open(path, framework="numpy") as file:
        for name, (dtype, _, value) in bits.items():
            if not dtype.startswith("F8"):  # which it does not read with NumPy
                assert file.get_tensor(name).tobytes() == value
                assert file.get_tensor(name).dtype == found[name].dtype


def test_what_torch_writes(path):
    torch = pytest.importorskip("torch", reason="needs the export extra")
    from safetensors.torch import save_file

    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)}
    save_file(tensors, path)
    for name, stored in read_safetensors(path).items():
        np.testing.assert_array_equal(stored.read().astype(np.float32), tensors[name].float().numpy())


def test_metadata(path):
    path.write_bytes(every_type()[0])
    assert metadata(path) == {"format": "pt", "größe": "1"}
    path.write_bytes(file_of({"a": entry("F32", [1], 0, 4)}, bytes(4)))
    assert metadata(path) == {}
    for damaged in (b"", b"1234567", file_of(b"{}", size=2**63)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            metadata(path)


ONE = {"a": entry("F32", [1], 0, 4)}
DAMAGED = {
    "nothing": b"",
    "no header": b"1234567",
    "a header of exabytes": file_of(b"{}", size=2**63),
    "a header of gigabytes": file_of(b"{}", size=2**31),
    "a header longer than the file": file_of(ONE, bytes(4), size=1000),
    "a long header": file_of({"__metadata__": {"x": "a" * (1 << 24)}}),
    "no JSON": file_of(b"{,}"),
    "a list": file_of(b"[]"),
    "half a header": file_of(json.dumps(ONE).encode()[:-3], bytes(4)),
    "no text": file_of(b'{"\xff":0}'),
    "half a character": file_of(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep in a field": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + b"[" * 2000 + b"]" * 2000 + b"}}", bytes(4)
    ),
    "too little data": file_of(ONE, bytes(3)),
    "too much data": file_of(ONE, bytes(5)),
    "no data": file_of(ONE),
    "a gap": file_of({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12)),
    "an overlap": file_of({"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 8, 24)}, bytes(24)),
    "backwards": file_of({"a": entry("F32", [1], 4, 0)}, bytes(4)),
    "another size than its shape": file_of({"a": entry("F32", [2], 0, 4)}, bytes(4)),
    "another size than its type": file_of({"a": entry("F16", [1], 0, 4)}, bytes(4)),
    "less than nothing": file_of({"a": entry("F32", [-1], 0, 4)}, bytes(4)),
    "sizes that overflow": file_of({"a": entry("F32", [2**32, 2**32], 0, 0)}),
    "sizes of many digits": file_of(
        b'{"a":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)
    ),
    "digits in another field": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1' + b"0" * 5000 + b"}}", bytes(4)
    ),
    "empty, and too large": file_of({"a": entry("F32", [0, 2**62, 2**62], 0, 0)}),
    "many dimensions": file_of({"a": entry("F32", [1] * 65, 0, 4)}, bytes(4)),
    "an unknown type": file_of({"a": entry("F7", [1], 0, 4)}, bytes(4)),
    "half a byte": file_of({"a": entry("F4", [2], 0, 1)}, bytes(1)),
    "a zip file": b"PK\x03\x04" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_told(path, data):
    refusal(path, data)


def test_types_of_half_a_byte_are_named(path):
    message = refusal(path, file_of({"a": entry("F4", [2], 0, 1)}, bytes(1)))
    assert f"{path}: a: a tensor is of a type that cannot be read" in message
    assert "F4" in message


def test_truncated_files_are_told(path):
    whole, _ = every_type()
    for fewer in range(1, len(whole), 97):
        assert "download it again" in refusal(path, whole[:-fewer])


def test_missing_files_are_told(path):
    for reader in (read_safetensors, metadata):
        with pytest.raises(CheckpointError, match="no such file"):
            reader(path)


def test_one_name_twice_is_read_as_the_library_reads_it(path):
    twice = (
        b'{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    path.write_bytes(file_of(twice, struct.pack("<f", 1)))
    try:
        found = read_safetensors(path)
    except CheckpointError:
        return
    with safe_open(path, framework="numpy") as file:
        np.testing.assert_array_equal(found["a"].read(), file.get_tensor("a"))


def test_views_outlive_everything_and_cannot_be_written_to(path):
    path.write_bytes(file_of({"a": entry("BF16", [2], 0, 4)}, np.array([1, 2], ml_dtypes.bfloat16).tobytes()))
    view = read_safetensors(path)["a"].read()
    path.unlink()
    np.testing.assert_array_equal(view.astype(np.float32), [1, 2])
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True


@pytest.mark.parametrize("of_header", [True, False])
def test_files_with_other_bytes_are_read_or_refused(path, of_header):
    """Nothing but a `CheckpointError` escapes, and what is read is what the library reads."""
    whole = file_of({"a": entry("F32", [2, 2], 0, 16), "b": entry("BF16", [], 16, 18)}, bytes(range(18)))
    size = struct.unpack("<Q", whole[:8])[0]
    random_ = random.Random(7)
    refused = 0
    for _ in range(2000):
        data = bytearray(whole[8 : 8 + size] if of_header else whole)
        for _ in range(random_.choice([1, 1, 2, 4])):
            at = random_.randrange(len(data))
            if random_.random() < 0.7:
                data[at] = random_.choice([random_.randrange(256), ord(random_.choice('0123456789{}[],":'))])
            elif random_.random() < 0.5:
                del data[at : at + random_.choice([1, 2])]
            else:
                data[at:at] = random_.randbytes(1)
        path.write_bytes(file_of(bytes(data), whole[8 + size :]) if of_header else data)
        try:
            found = read_safetensors(path)
        except CheckpointError:
            refused += 1
            continue
        with safe_open(path, framework="numpy") as file:
            for name, stored in found.items():
                assert stored.shape == tuple(file.get_slice(name).get_shape())
                if not file.get_slice(name).get_dtype().startswith("F8"):
                    assert stored.read().tobytes() == file.get_tensor(name).tobytes()
    assert 500 < refused < 2000


def test_reading_imports_no_torch_and_copies_nothing(path):
    path.write_bytes(file_of({"a": entry("BF16", [1 << 25], 0, 1 << 26)}, bytes(1 << 26)))
    lines = (
        "import sys, resource",
        "from pathlib import Path",
        "from export.checkpoint.safetensors_file import metadata, read_safetensors",
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
        "found = read_safetensors(Path(sys.argv[1]))",
        "assert found['a'].read()[1 << 24] == 0 and not metadata(Path(sys.argv[1]))",
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10, 'torch' in sys.modules)",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "True False\n"
