"""Files that torch would not write: each is refused, and nothing in it runs. No test here needs torch."""

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from torch_pickles import FOUR_FLOATS, ORDERED_DICT, number, numbers, state, storage, tensor, text, zipped

from engine.errors import CheckpointError
from export.checkpoint import state_pickle
from export.checkpoint.torch_zip import is_torch_zip, read_torch_zip


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where attacks leave their marker
    return tmp_path / "model.ckpt"


def read(path, data):
    path.write_bytes(data)
    return read_torch_zip(path)


def refusal(path, data):
    with pytest.raises(CheckpointError) as caught:
        read(path, data)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message) < 1000
    assert all(line.isprintable() for line in message.split("\n"))
    return message


def test_files_put_together_by_hand_are_read(path):
    """Else nothing below would show anything."""
    found = read(path, zipped(state(tensor(shape=(2, 2), strides=(1, 2)))))
    np.testing.assert_array_equal(found["a"].read(), [[1, 3], [2, 4]])
    assert is_torch_zip(path)


# -- pickles that run something -------------------------------------------------------------------

MARKER = "ran"
TOUCH = text(f"touch {MARKER}")
PYTHON = text(f"open('{MARKER}', 'w').close()")
IMPORT_OS = b"cbuiltins\n__import__\n" + text("os") + b"\x85R"
TOUCH_LIST = b"](" + text("touch") + text(MARKER) + b"e"


class Touch:
    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


RUNNING = {
    "protocol 0": (pickle.dumps({"a": Touch()}, 0), "the instruction DICT"),
    "protocol 2": (pickle.dumps({"a": Touch()}, 2), "posix.system"),
    "protocol 4": (pickle.dumps({"a": Touch()}, 4), "posix.system"),
    "protocol 5": (pickle.dumps({"a": Touch()}, 5), "posix.system"),
    "not in a dictionary": (b"\x80\x02cos\nsystem\n" + TOUCH + b"\x85R.", "os.system"),
    "eval": (state(b"cbuiltins\neval\n" + PYTHON + b"\x85R"), "builtins.eval"),
    "exec of Python 2": (state(b"c__builtin__\nexec\n" + PYTHON + b"\x85R"), "__builtin__.exec"),
    "getattr": (
        state(b"cbuiltins\ngetattr\n" + IMPORT_OS + text("system") + b"\x86R" + TOUCH + b"\x85R"),
        "builtins.getattr",
    ),
    "attrgetter": (
        state(b"coperator\nattrgetter\n" + text("system") + b"\x85R" + IMPORT_OS + b"\x85R" + TOUCH + b"\x85R"),
        "operator.attrgetter",
    ),
    "partial": (state(b"cfunctools\npartial\ncos\nsystem\n" + TOUCH + b"\x86R)R"), "functools.partial"),
    "map": (state(b"cbuiltins\nlist\ncbuiltins\nmap\ncos\nsystem\n]" + TOUCH + b"a\x86R\x85R"), "builtins.list"),
    "subprocess": (state(b"csubprocess\ncall\n" + TOUCH_LIST + b"\x85R"), "subprocess.call"),
    "INST": (state(b"(" + TOUCH + b"ios\nsystem\n"), "the instruction INST"),
    "OBJ": (state(b"(csubprocess\ncall\n" + TOUCH_LIST + b"o"), "subprocess.call"),
    "a pickle in it": (
        state(b"cpickle\nloads\nB" + struct.pack("<I", len(TOUCH) + 15) + b"cos\nsystem\n(" + TOUCH + b"tR.\x85R"),
        "pickle.loads",
    ),
    "before the tensors": (
        b"\x80\x02cos\nsystem\n" + TOUCH + b"\x85Rq\x00" + state(tensor())[2:],
        "os.system",
    ),
    "inside a call that is allowed": (
        state(tensor(more=b"cos\nsystem\n" + TOUCH + b"\x85R")),
        "os.system",
    ),
}


@pytest.mark.parametrize(("pickled", "found"), RUNNING.values(), ids=RUNNING)
def test_pickles_that_run_something_are_refused_and_do_not(path, pickled, found):
    marker = path.with_name(MARKER)
    assert f"found:    {found}" in refusal(path, zipped(pickled))
    assert not marker.exists()
    if b"torch" not in pickled:
        with contextlib.suppress(Exception):  # whatever comes behind the call
            pickle.loads(pickled)
        assert marker.exists(), "this is no attack: Python's own unpickler runs nothing either"


NAMES = [
    "torch.load",
    "torch.hub.load",
    "torch.storage._load_from_bytes",
    "torch.jit.load",
    "torch.Tensor",
    "torch.FloatStorage.__init__",
    "torch._utils._rebuild_wrapper_subclass",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._tensor._rebuild_from_type_v2",
    "torch.ComplexFloatStorage",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "collections.OrderedDict.__init__",
    "collections.OrderedDict.fromkeys.__globals__",
    "collections.Counter",
    "builtins.bytearray",
    "builtins.set",
    "_codecs.encode",
    "copyreg.__newobj__",
    "export.checkpoint.torch_zip._find_global",
    "__main__.Model",
    "__torch__.torch.nn.modules.linear.Linear",  # TorchScript
    "",
    "x" * 5000,
    "\x1b[2J",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [2, 4])
def test_names_that_tensors_do_not_need_are_refused(path, name, protocol):
    module, _, attribute = name.partition(".")
    in_stack, in_lines = text(module) + text(attribute) + b"\x93", f"c{module}\n{attribute}\n".encode()
    named = in_stack if protocol == 4 else in_lines
    message = refusal(path, zipped(state(named + text("x") + b"\x85R")))
    assert "it could run any code" in message
    assert name[:100] in message or name == "\x1b[2J"


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("_rebuild_sparse_tensor", "a sparse tensor"),
        ("_rebuild_qtensor", "a quantized tensor"),
        ("_rebuild_nested_tensor", "a nested tensor"),
        ("_rebuild_meta_tensor_no_storage", "a tensor without values"),
    ],
)
def test_other_kinds_of_tensors_are_refused_by_name(path, function, kind):
    message = refusal(path, zipped(state(f"ctorch._utils\n{function}\n".encode() + b")R")))
    assert kind in message
    assert function in message


# -- pickles that abuse what is allowed -----------------------------------------------------------

ABUSES = {
    "a call of a storage's type": (state(b"ctorch\nFloatStorage\n)R"), "no function, but _StorageType"),
    "a call of a type": (state(b"ctorch\nuint16\n)R"), "a call of what is no function"),
    "a call of a dictionary": (state(ORDERED_DICT + b")R"), "no function, but OrderedDict"),
    "a call of text": (state(text("os.system") + b")R"), "no function, but str"),
    "a call without a tuple": (state(b"ccollections\nOrderedDict\nNR"), "a call without arguments"),
    "a call with a list": (state(b"ccollections\nOrderedDict\n]R"), "a call without arguments"),
    "an OrderedDict of something": (state(b"ccollections\nOrderedDict\n]\x85R"), "an OrderedDict with arguments"),
    "attributes of a tensor": (state(tensor() + b"}" + text("read") + b"Nsb"), "attributes of _Tensor"),
    "attributes of a storage": (state(storage() + b"}" + text("member") + b"Nsb"), "attributes of _Storage"),
    "attributes of a type": (state(b"ctorch\nFloatStorage\n}b"), "attributes of _StorageType"),
    "attributes of a function": (state(b"ccollections\nOrderedDict\n}b"), "attributes of Function"),
    "attributes of a dictionary": (state(b"}}b"), "attributes of dict"),
    "items for a tensor": (state(tensor() + b"Na"), "no list, but _Tensor"),
    "items for a tuple": (state(b")(NNe"), "no list, but tuple"),
    "entries for a list": (state(b"]" + text("x") + b"Ns"), "no dictionary, but list"),
    "entries for a function": (state(b"ccollections\nOrderedDict\n" + text("call") + b"Ns"), "no dictionary"),
    "a key without a value": (state(b"}(" + text("x") + b"u"), "a key without a value"),
    "a key that is a tuple": (state(b"})Ns"), "a key that is no text, but tuple"),
    "a key that is a tensor": (state(b"}" + tensor() + b"Ns"), "a key that is no text, but _Tensor"),
    "a key that is a list": (state(b"}]Ns"), "a key that is no text, but list"),
    "a key of many bits": (state(b"}" + number(2**63) + b"Ns"), "a key that is no text, but int"),
    "NEWOBJ": (state(b"ccollections\nOrderedDict\n)\x81"), "the instruction NEWOBJ"),
    "NEWOBJ_EX": (state(b"ccollections\nOrderedDict\n)}\x92"), "the instruction NEWOBJ_EX"),
    "OBJ": (state(b"(ccollections\nOrderedDict\no"), "the instruction OBJ"),
    "EXT1": (state(b"\x82\x01"), "the instruction EXT1"),
    "EXT4": (state(b"\x84\x01\x00\x00\x00"), "the instruction EXT4"),
    "PERSID": (state(b"Pstorage\n"), "the instruction PERSID"),
    "a buffer": (state(b"\x97"), "the instruction NEXT_BUFFER"),
    "a set": (state(b"\x8f"), "the instruction EMPTY_SET"),
    "bytes": (state(b"C\x01x"), "the instruction SHORT_BINBYTES"),
    "no instruction": (state(b"\xff"), "byte 0xff where an instruction should be"),
    "a later protocol": (b"\x80\x06N.", "an unknown protocol"),
    "a reference of text": (state(text("0") + b"Q"), "a reference to what is no storage"),
    "a reference to nothing": (state(b"NQ"), "a reference to what is no storage"),
    "a short reference": (state(text("storage") + b"\x85Q"), "a reference to what is no storage"),
    "a reference to a module": (state(storage(word="module")), "a reference to what is no storage"),
    "a storage of a function": (state(storage("collections\nOrderedDict")), "a reference to what is no storage"),
    "a storage with a key that is no text": (
        state(b"(" + text("storage") + b"ctorch\nFloatStorage\nK\x00" + text("cpu") + b"K\x04tQ"),
        "a reference to what is no storage",
    ),
    "a storage that is not there": (state(storage(key="1")), "no storage 1"),
    "a storage somewhere else": (state(storage(key="../data.pkl")), "no storage ../data.pkl"),
    "a storage that is too short": (state(storage(count=5)), "storage 0 has 16 bytes, not 5 × 4"),
    "a storage that is too long": (state(storage(count=3)), "storage 0 has 16 bytes, not 3 × 4"),
    "a storage of a terabyte": (state(storage(count=2**40)), "storage 0 has 16 bytes"),
    "a storage of two types": (state(storage() + storage("torch\nIntStorage") + b"\x86"), "storage 0 has two types"),
    "a storage of less than nothing": (state(storage(count=-4)), "storage 0 has 16 bytes"),
    "an empty stack": (b"\x80\x02.", "uses what it never made"),
    "too few for a tuple": (b"\x80\x02N\x86.", "uses what it never made"),
    "no mark": (b"\x80\x02Nt.", "uses what it never made"),
    "nothing to remember": (b"\x80\x02q\x00.", "uses what it never made"),
    "nothing remembered": (b"\x80\x02h\x07.", "uses what it never made"),
    "no end": (b"\x80\x02N", "the pickle ends early"),
    "nothing": (b"", "the pickle ends early"),
    "a name without an end": (b"\x80\x02ctorch", "the pickle ends early"),
    "a name that is no text": (b"\x80\x04NN\x93.", "a name in the pickle is no text"),
    "text that is no UTF-8": (b"\x80\x02X\x01\x00\x00\x00\xff.", "can't decode"),
    "text with half a character": (b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.", "can't decode"),
    "text of exabytes": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fx.", "the pickle ends early"),
    "a number of gigabytes": (b"\x80\x02\x8b\xff\xff\xff\x7fx.", "the instruction LONG4"),
    "bytes of exabytes": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "the instruction BYTEARRAY8"),
    "a list": (b"\x80\x02].", "not a dictionary of tensors"),
    "a tensor": (b"\x80\x02" + tensor() + b".", "not a dictionary of tensors"),
    "a number among the tensors": (state(b"K\x03"), "a: the pickle holds more than tensors"),
    "a type among the tensors": (state(b"ctorch\nFloatStorage\n"), "found:    StorageType"),
    "a name that is a number": (b"\x80\x02}K\x01" + tensor() + b"s.", "1: a tensor's name is no text"),
    "a dictionary in itself": (b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s.", "found:    dict"),
}


@pytest.mark.parametrize(("pickled", "found"), ABUSES.values(), ids=ABUSES)
def test_pickles_that_abuse_what_is_allowed_are_refused(path, pickled, found):
    assert found in refusal(path, zipped(pickled))


TENSORS = {
    "behind the storage": (tensor(offset=1), "reaches outside of its storage"),
    "before the storage": (tensor(offset=-1), "reaches outside of its storage"),
    "more elements": (tensor(shape=(5,)), "reaches outside of its storage"),
    "wider strides": (tensor(shape=(2, 2), strides=(3, 1)), "reaches outside of its storage"),
    "strides backwards": (tensor(strides=(-1,), offset=3), "reaches outside of its storage"),
    "less than nothing": (tensor(shape=(-1,)), "reaches outside of its storage"),
    "sizes that overflow": (tensor(shape=(2**62, 4), strides=(4, 1)), "reaches outside of its storage"),
    "strides that overflow": (tensor(shape=(2, 2), strides=(2**64, 2**64)), "reaches outside of its storage"),
    "an offset that overflows": (tensor(offset=2**64), "reaches outside of its storage"),
    "numbers of many digits": (tensor(shape=(2**2000,) * 30, strides=(1,) * 30), "reaches outside of its storage"),
    "one value a terabyte long": (tensor(shape=(10**6, 10**6), strides=(0, 0)), "larger than what is stored"),
    "empty, and too large": (tensor(shape=(0, 2**62, 2**62), strides=(0, 0, 0)), "shape is impossible"),
    "many dimensions": (tensor(shape=(1,) * 33, strides=(1,) * 33), "do not fit together"),
    "too few strides": (tensor(shape=(2, 2)), "do not fit together"),
    "a shape of truths": (tensor().replace(numbers((4,)), b"\x88\x85", 1), "shape is no numbers"),
    "a shape of fractions": (
        tensor().replace(numbers((4,)), b"G" + struct.pack(">d", 4) + b"\x85", 1),
        "shape is no numbers",
    ),
    "a shape that is no tuple": (tensor().replace(numbers((4,)), b"K\x04", 1), "do not fit together"),
    "no storage": (tensor(held=b"N"), "another storage than its kind has"),
    "a tensor of a tensor": (tensor(held=tensor()), "another storage than its kind has"),
    "too much": (tensor(more=b"NN"), "too few or too many arguments"),
    "too little": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "too few or too many arguments"),
    "negated": (tensor(more=b"}" + text("neg") + b"\x88s"), "negated or conjugated view"),
    "a type for a storage that has one": (tensor(version=3, more=b"ctorch\nuint16\n"), "another storage than"),
    "no type": (tensor(held=storage("torch.storage\nUntypedStorage", count=16)), "another storage than its kind has"),
    "a type that is none": (
        tensor(version=3, held=storage("torch.storage\nUntypedStorage", count=16), more=text("float32")),
        "a tensor without a type",
    ),
    "bytes that make no element": (
        tensor(
            version=3, shape=(9,), held=storage("torch.storage\nUntypedStorage", count=16), more=b"ctorch\nuint16\n"
        ),
        "reaches outside of its storage",
    ),
    "a parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\nN\x89N\x87R", "or without a tensor"),
}


@pytest.mark.parametrize(("value", "found"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_cannot_be_are_refused(path, value, found):
    assert found in refusal(path, zipped(state(value)))


def test_errors_name_the_tensor(path):
    assert f"{path}: a: a tensor reaches outside" in refusal(path, zipped(state(tensor(offset=1))))


def test_what_is_left_of_a_pickle_does_not_run(path):
    found = read(path, zipped(state(tensor()) + pickle.dumps(Touch())))
    assert list(found) == ["a"]
    assert not path.with_name(MARKER).exists()


def test_attributes_of_a_dictionary_are_left_out(path):
    """A module's `state_dict` has some; these would hide its methods."""
    attributes = b"}(" + text("items") + b"N" + text("get") + b"N" + text("__class__") + b"Nu"
    pickled = b"\x80\x02" + ORDERED_DICT + text("a") + tensor() + b"s" + attributes + b"b."
    assert list(read(path, zipped(pickled))) == ["a"]


MOST = state_pickle._MOST_INSTRUCTIONS - 100
BOMBS = {
    "a memo with a high number": b"\x80\x02Nr\xff\xff\xff\xff.",  # 8 GB with Python's own
    "a deep tuple as a key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",  # a crash with Python's own
    "a deep tuple": b"\x80\x02)" + b"\x85" * MOST + b".",
    "a deep list": b"\x80\x02" + b"]" * (MOST // 2) + b"a" * (MOST // 2 - 1) + b".",
    "marks": b"\x80\x02" + b"(" * MOST + b".",
    "a laugh that doubles": state(b")q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"}h\x00Ns"),
    "keys of one hash": b"\x80\x02}" + b"".join(number((2**61 - 1) * n) + b"Ns" for n in range(2, 50_000)) + b".",
    "too many instructions": b"N" * (MOST + 200) + b".",
    "too many bytes": b"\x80\x02" + text("x" * state_pickle.MOST_BYTES) + b".",
    "one long shape, many tensors": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00(" + b"N" * 10**6 + b"tq\x01"
    + b"".join(b"h\x00(" + storage() + b"K\x00h\x01h\x01\x89NtR" for _ in range(1000)) + b".",
}  # fmt: skip


@pytest.mark.parametrize("pickled", BOMBS.values(), ids=BOMBS)
@pytest.mark.timeout(60)
def test_bombs_are_refused_in_bounded_memory(path, pickled):
    path.write_bytes(zipped(pickled))
    lines = (
        "import resource, sys",
        "from pathlib import Path",
        "from engine.errors import CheckpointError",
        "from export.checkpoint.torch_zip import read_torch_zip",
        "before = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()",
        "resource.setrlimit(resource.RLIMIT_AS, (before + (1 << 29),) * 2)",
        "try: read_torch_zip(Path(sys.argv[1]))",
        "except CheckpointError: print('refused')",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.stdout, done.stderr) == ("refused\n", "")


# -- zip files ------------------------------------------------------------------------------------

GOOD = zipped(state(tensor()))
LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def edit(signature, offset, data, nth=0, source=GOOD):
    """Return a zip file with other bytes in its nth header of a kind."""
    at = -1
    for _ in range(nth + 1):
        at = source.index(signature, at + 1)
    at += offset
    return source[:at] + data + source[at + len(data) :]


def both(local_offset, central_offset, data):
    return edit(LOCAL, local_offset, data, 1, edit(CENTRAL, central_offset, data, 1))


def two_pickles():
    target = io.BytesIO(GOOD)
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("other/data.pkl", state(tensor()))
    return target.getvalue()


def twice_one_name():
    target = io.BytesIO(GOOD)
    with zipfile.ZipFile(target, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", pickle.dumps(Touch()))
    return target.getvalue()


def in_another():
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("model.ckpt", GOOD)
    return target.getvalue()


ZIPS = {
    "compressed": (zipped(state(tensor()), compression=zipfile.ZIP_DEFLATED), "compressed, so it cannot be mapped"),
    "compressed a bit": (both(8, 10, b"\x08\x00"), "compression method 8"),
    "compressed in the header alone": (edit(LOCAL, 8, b"\x08\x00", 1), "header and the directory differ"),
    "encrypted": (both(6, 8, b"\x01\x00"), "the zip file is encrypted"),
    "encrypted in the header alone": (edit(LOCAL, 6, b"\x01\x00", 1), "header and the directory differ"),
    "another name in the header": (edit(LOCAL, 30, b"x", 1), "header and the directory differ"),
    "another size in the header": (edit(LOCAL, 22, b"\x09", 1), "header and the directory differ"),
    "another compressed size": (edit(CENTRAL, 20, b"\x09", 1), "header and the directory differ"),
    "no header": (edit(LOCAL, 0, b"XX", 1), "header and the directory differ"),
    "a longer name in the header": (edit(LOCAL, 26, b"\xff\xff", 1), "header and the directory differ"),
    "far data": (edit(LOCAL, 28, b"\xff\xff", 1), "reaches into the directory"),
    "a header behind the file": (edit(CENTRAL, 42, b"\xff\xff\xff\x7f", 1), "lies outside of the file"),
    "two members in one place": (edit(CENTRAL, 42, bytes(4), 1), "members overlap"),
    "a member in another": (edit(CENTRAL, 42, b"\x20", 1), "members overlap"),
    "a long member": (
        edit(LOCAL, 22, b"\xff\xff", 1, edit(LOCAL, 18, b"\xff\xff", 1,
             edit(CENTRAL, 24, b"\xff\xff", 1, edit(CENTRAL, 20, b"\xff\xff", 1)))),
        "reaches into the directory",
    ),
    "one name twice": (twice_one_name, "two members have one name"),
    "an archive in front": (GOOD + zipped(pickle.dumps(Touch())), "begin late"),
    "something in front": (b"PK" + GOOD, "begin late"),
    "an archive in another": (in_another, "0 of them"),
    "two pickles": (two_pickles, "2 of them"),
    "no pickle": (GOOD.replace(b"data.pkl", b"data.abc"), "0 of them"),
    "no folder": (GOOD.replace(b"archive/data.pkl", b"archive_data.pkl"), "0 of them"),
    "no members": (b"PK\x05\x06" + bytes(18), "0 of them"),
    "another order of bytes": (
        zipped(state(tensor()), {"data/0": FOUR_FLOATS, "byteorder": b"big"}),
        "found:    big",
    ),
    "an unknown order of bytes": (
        zipped(state(tensor()), {"data/0": FOUR_FLOATS, "byteorder": b"\xffmiddle" * 1000}),
        "another order of bytes",
    ),
    "a directory of gigabytes": (edit(END, 12, b"\xff\xff\xff\x7f"), "not a whole checkpoint"),
    "a directory elsewhere": (edit(END, 16, b"\xff\xff\xff\x7f"), "not a whole checkpoint"),
    "a later version of zip": (edit(CENTRAL, 6, b"\xff"), "not a whole checkpoint"),
    "no zip": (b"PK\x03\x04 not a zip", "not a whole checkpoint"),
    "two letters": (b"PK", "not a whole checkpoint"),
    "a pickle alone": (state(tensor()), "not a zip file of torch.save"),
    "nothing": (b"", "the file is empty"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "found"), ZIPS.values(), ids=ZIPS)
def test_zip_files_that_torch_does_not_write_are_refused(path, data, found):
    assert found in refusal(path, data() if callable(data) else data)


@pytest.mark.parametrize("fewer", range(1, len(GOOD) - 2, 7))
def test_truncated_files_are_told(path, fewer):
    assert "download it again" in refusal(path, GOOD[:-fewer])


def test_missing_files_are_told(path):
    for reader in (is_torch_zip, read_torch_zip):
        with pytest.raises(CheckpointError):
            reader(path)
        with pytest.raises(CheckpointError):
            reader(path.parent)


def test_names_of_members_lead_nowhere(path):
    names = {"data/0": FOUR_FLOATS, "../../escaped": b"x", "/escaped": b"x", "a\\..\\b": b"x", "\x1b[2J": b"x"}
    assert list(read(path, zipped(state(tensor()), names))) == ["a"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_large_zip_files(path, monkeypatch):
    """The fields that files of more than 4 GB have, in a small one."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8)
    data = zipped(state(tensor()))
    assert b"PK\x06\x06" in data
    np.testing.assert_array_equal(read(path, data)["a"].read(), [1, 2, 3, 4])


def test_views_outlive_everything_and_cannot_be_written_to(path):
    view = read(path, GOOD)["a"].read()
    path.unlink()
    np.testing.assert_array_equal(view, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True
