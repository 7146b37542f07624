"""Files in torch's zip format, put together by hand: what torch writes, and what it never would."""

import io
import struct
import zipfile

ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(values):
    return b"(" + b"".join(number(value) for value in values) + b"t"


def storage(kind="torch\nFloatStorage", key="0", count=4, word="storage", place="cpu"):
    return b"(" + text(word) + b"c" + kind.encode() + b"\n" + text(key) + text(place) + number(count) + b"tQ"


def tensor(shape=(4,), strides=(1,), offset=0, held=None, more=b"", version=2):
    """Return a call of `_rebuild_tensor_v2`, or `_v3`; `more` follows the hooks."""
    return (
        f"ctorch._utils\n_rebuild_tensor_v{version}\n(".encode()
        + (storage() if held is None else held)
        + number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89"
        + ORDERED_DICT
        + more
        + b"tR"
    )


def state(value, name="a"):
    """Return a pickle of a dictionary with one entry."""
    return b"\x80\x02}" + text(name) + value + b"s."


def zipped(pickled, members=None, *, root="archive", compression=zipfile.ZIP_STORED):
    """Return a zip file of a pickle and of members below its folder: by default four floats as storage 0."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        for name, data in ({"data/0": FOUR_FLOATS} if members is None else members).items():
            archive.writestr(f"{root}/{name}", data)
    return target.getvalue()
