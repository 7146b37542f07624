"""Bundles from strangers: each ends as one error of ours, before a library reads what it should not."""

import copy
import hashlib
import json
import os
import shutil
from random import Random

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the build extra")
from onnx import TensorProto, helper

from engine import Restorer
from engine.backends.ort import OrtBackend
from engine.bundle.files import MANIFEST
from engine.bundle.manifest import open_bundle
from engine.errors import BackendError, BundleError, RestoreError

SETTINGS = {"steps": 1, "min_size": 64}
PHOTO = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)


@pytest.fixture
def hostile(bundle_fp32, tmp_path):
    return shutil.copytree(bundle_fp32, tmp_path / "hostile")


def sign(folder):
    """Make a manifest say of each file what is there: a stranger can do that too."""

    def walk(value):
        if isinstance(value, dict):
            if set(value) == {"name", "bytes", "sha256"}:
                content = (folder / value["name"]).read_bytes()
                value.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for part in value.values():
                walk(part)
        elif isinstance(value, list):
            for part in value:
                walk(part)

    manifest = json.loads((folder / MANIFEST).read_text())
    walk({name: part for name, part in manifest.items() if name != "key"})
    (folder / MANIFEST).write_text(json.dumps(manifest))


def restore(folder, **settings):
    with Restorer(open_bundle(folder), OrtBackend(1)) as restorer:
        return restorer.restore(PHOTO, **{**SETTINGS, **settings}).photo.rgb


def change_graph(folder, graph, change):
    file = folder / f"{graph}.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())
    sign(folder)


def point_to(location):
    def change(model):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    return change


def place(**keys):
    def change(model):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        entries = {entry.key: entry.value for entry in tensor.external_data} | keys
        del tensor.external_data[:]
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    return change


def add_loop(model):
    """2^62 turns of nothing."""
    number = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    flag = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    same = helper.make_tensor_value_info("d", TensorProto.BOOL, [])
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "body", [number, flag], [same])
    model.graph.initializer.append(helper.make_tensor("turns", TensorProto.INT64, [], [1 << 62]))
    model.graph.node.append(helper.make_node("Loop", ["turns", ""], [], body=body))


def add_foreign_operator(model):
    model.graph.node.append(helper.make_node("Evil", [model.graph.input[0].name], ["e"], domain="evil.so"))
    model.opset_import.append(helper.make_opsetid("evil.so", 1))


def add_function(model):
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], [node], [helper.make_opsetid("", 18)]))


def add_constant_from_a_file(model):
    tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["k"], value=tensor))


GRAPHS = {
    "a file of the computer": point_to("/etc/passwd"),
    "a file outside": point_to("../outside.safetensors"),
    "a file that the manifest does not list": point_to("evil.bin"),
    "an address": point_to("*/_ORT_MEM_ADDR_/*"),
    "no file": place(location=None),
    "a negative offset": place(offset="-1"),
    "an endless offset": place(offset="9" * 40),
    "beyond the weights": place(offset=str(1 << 40)),
    "no length": place(length=None),
    "a loop": add_loop,
    "a foreign operator": add_foreign_operator,
    "a function": add_function,
    "a constant from a file": add_constant_from_a_file,
    "nothing": lambda model: model.graph.ClearField("node"),
}


@pytest.mark.parametrize("change", GRAPHS.values(), ids=GRAPHS)
def test_a_graph_reads_the_bundles_weights_and_nothing_else(hostile, change):
    (hostile / "evil.bin").write_bytes((hostile / "weights.safetensors").read_bytes())
    change_graph(hostile, "vae_decoder", change)
    with pytest.raises(BundleError, match="a graph that no bundle of this engine holds"):
        open_bundle(hostile).read_graph("vae_decoder")
    with pytest.raises(BundleError, match="a graph that no bundle of this engine holds"):
        restore(hostile)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x3a\xff\xff\xff\xff\x07", b"hello" * 1000])
def test_a_graph_that_is_none_is_refused(hostile, content):
    (hostile / "unet.onnx").write_bytes(content)
    sign(hostile)
    with pytest.raises(BundleError, match="a graph that no bundle of this engine holds"):
        restore(hostile)


def test_segments_are_checked_as_graphs_are(hostile):
    import zipfile

    file = hostile / "vae_decoder.segments.zip"
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            model = onnx.load_from_string(content)
            point_to("/etc/passwd")(model)
            archive.writestr(name, model.SerializeToString())
    sign(hostile)
    with pytest.raises(BundleError, match="a graph that no bundle of this engine holds"):
        restore(hostile, vae_tiles="exact")


def test_a_graph_of_another_role_is_refused(hostile):
    shutil.copy(hostile / "text_encoder.onnx", hostile / "vae_decoder.onnx")
    sign(hostile)
    with pytest.raises(RestoreError, match="not the graph that its bundle describes"):
        restore(hostile)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", [MANIFEST, "tokenizer.json", "unet.onnx"])
@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
@pytest.mark.timeout(60)
def test_pipes_and_devices_are_refused(hostile, name, target):
    (hostile / name).unlink()
    if target == "pipe":
        os.mkfifo(hostile / name)
    else:
        (hostile / name).symlink_to(target)
    with pytest.raises(BundleError, match="no plain file"):
        open_bundle(hostile)


@pytest.mark.parametrize("name", ["unet.onnx", "weights.safetensors", "tokenizer.json"])
def test_what_was_hashed_is_what_is_read(hostile, name):
    """Files that are changed, or replaced, between opening the bundle and opening a graph."""
    bundle = open_bundle(hostile)
    file = hostile / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.with_suffix(".new").write_bytes(content)
    file.with_suffix(".new").replace(file)
    with pytest.raises(BundleError, match="was changed"), Restorer(bundle, OrtBackend(1)) as restorer:
        restorer.restore(PHOTO, **SETTINGS)


def test_files_that_are_linked_elsewhere_are_still_the_same(hostile, tmp_path):
    bundle = open_bundle(hostile)
    for name in ("unet.onnx", "weights.safetensors"):
        os.link(hostile / name, tmp_path / name)
    assert bundle.read_graph("unet") == (hostile / "unet.onnx").read_bytes()


def test_weights_that_are_a_link_elsewhere_are_told_with_what_to_do(hostile, tmp_path):
    """As in a download cache that keeps files under other names; ONNX Runtime reads no file outside of the folder."""
    (hostile / "weights.safetensors").rename(tmp_path / "blob")
    (hostile / "weights.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(BackendError, match="cannot open the graph") as caught:
        restore(hostile)
    assert "cp -rL" in caught.value.fix


def test_weights_that_are_changed_by_mapping_are_noticed(hostile):
    import mmap

    bundle = open_bundle(hostile)
    with Restorer(bundle, OrtBackend(1)) as restorer:
        restorer.restore(PHOTO, **SETTINGS)
        with (hostile / "weights.safetensors").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[len(mapped) - 1] ^= 1
            mapped.flush()
        restorer._runners.close()
        with pytest.raises(BundleError, match="a file of the bundle was changed"):
            restorer.restore(PHOTO, **SETTINGS)


# -- manifests ----------------------------------------------------------------------------------------


def places(value, path=()):
    """Yield the place of every value in a manifest, with one entry for lists of the like."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, list):
        yield path
        for index, part in enumerate(value[:2]):
            yield from places(part, (*path, index))
    else:
        yield path


def at(value, path):
    for key in path:
        value = value[key]
    return value


def variants(value):
    if isinstance(value, bool) or value is None:
        return [0, "x"]
    if isinstance(value, int):
        return [0, -1, 1 << 31, 1 << 63, 10**30, value + 1]
    if isinstance(value, float):
        return [0.0, -1.0, 1e308, 1e-320]
    if isinstance(value, str):
        names = ["", "../../etc/passwd", "/etc/passwd", "a\0b", "x\ud800", ".", MANIFEST, "\u202egpj.exe"]
        return [*names, "8*h/0", "0*h", "99999999999999999999*h", "h/3", "77*k"]
    return [[], value + value, value[:-1]]


def mutations(manifest):
    """Yield (place, value) for one of each kind of place; what only describes a build is left out."""
    seen = set()
    for path in places(manifest):
        kind = tuple("#" if isinstance(key, int) else key for key in path)
        if path[0] in ("key", "built_with", "sources", "loras") or kind in seen:
            continue
        seen.add(kind)
        for value in variants(at(manifest, path)):
            if value != at(manifest, path):
                yield path, value


@pytest.fixture(scope="module")
def mutated(bundle_fp32, tmp_path_factory):
    """A folder whose files are the bundle's; and every mutation of its manifest, in an order of its own."""
    folder = tmp_path_factory.mktemp("mutated")
    for file in bundle_fp32.iterdir():
        if file.name != MANIFEST:
            shutil.copy(file, folder)
    manifest = json.loads((bundle_fp32 / MANIFEST).read_text())
    found = list(mutations(manifest))
    Random(1).shuffle(found)
    return folder, manifest, found


def outcome(folder, manifest, path, value, **settings):
    """Return what a mutated manifest leads to: the picture, or an error of ours, which is all that may be raised."""
    changed = copy.deepcopy(manifest)
    at(changed, path[:-1])[path[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(changed))
    try:
        return restore(folder, **settings)
    except RestoreError as error:
        return error


@pytest.mark.parametrize("count", [40, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_a_manifest_with_one_wrong_value_is_an_error_of_ours_or_harmless(mutated, count):
    """What is accepted says nothing that the networks depend on: the picture is the same, or of the right size."""
    folder, manifest, found = mutated
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert restore(folder).shape == PHOTO.shape
    accepted = []
    for path, value in found[:count]:
        result = outcome(folder, manifest, path, value)
        if isinstance(result, np.ndarray):
            assert result.shape == PHOTO.shape
            accepted.append(path)
    described = {
        "name",
        "preset",
        "built",
        "notice",
        "backend",
        "defaults",
        "presets",
        "verification",
        "weights_bytes",
        "eps",
    }
    harmless = {"tokenizer", "frequencies", "groups", "halo", "precision", "dtype", "multiples", "pieces", "segments"}
    assert all(described & set(path) or harmless & set(path) for path in accepted), accepted


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 100_000,
        "[" * 1_000_000,
        '{"format": 1' + "0" * 5000 + "}",
        '{"format": 6, "format": 5}',
        "\x00" * 100,
        "",
        "null",
    ],
    ids=["deep", "deeper", "huge number", "twice", "zeros", "empty", "null"],
)
def test_a_file_that_is_no_manifest_is_refused(hostile, text):
    (hostile / MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        open_bundle(hostile)


def test_settings_of_a_bundle_are_bounded(hostile):
    manifest = json.loads((hostile / MANIFEST).read_text())
    manifest["defaults"]["steps"] = 10**9
    (hostile / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="the manifest is damaged"):
        open_bundle(hostile)
