import json
import shutil

import pytest

from engine.bundle.files import MANIFEST
from engine.bundle.manifest import default_bundle_dir, open_bundle, read_manifest
from engine.errors import BundleError, UsageError
from engine.recipe import GRAPHS


@pytest.fixture
def copy(bundle_fp32, tmp_path):
    return shutil.copytree(bundle_fp32, tmp_path / "bundle")


def edit_manifest(path, change):
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_a_whole_bundle_opens_and_describes_itself(bundle_fp32):
    bundle = open_bundle(bundle_fp32)
    assert set(bundle.manifest.graphs) == set(GRAPHS)
    assert (bundle.latent_channels, bundle.pixels_per_cell, bundle.size_multiple) == (4, 8, 64)
    assert bundle.manifest.precision == "fp32"
    assert {source.role for source in bundle.manifest.sources} == {"sdxl", "supir"}
    assert all(len(source.sha256) == 64 for source in bundle.manifest.sources)
    for graph in bundle.manifest.graphs.values():
        assert 0 < graph.verification.when_traced.worst <= graph.verification.when_traced.bound
        assert graph.verification.in_build is None
        assert (graph.verification.trial.in_slices is None) == (not graph.segments)
    assert bundle.digest == open_bundle(bundle_fp32).digest


def test_graphs_point_into_one_weights_file(bundle_fp32):
    onnx = pytest.importorskip("onnx")
    names = set()
    for graph in GRAPHS:
        model = onnx.load(bundle_fp32 / f"{graph}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                assert {entry.key: entry.value for entry in tensor.external_data}["location"] == "weights.safetensors"
                names.add(tensor.name)
    assert len(names) > 1400
    assert "vae.quant_conv.weight" in names
    assert sum(path.stat().st_size for path in bundle_fp32.glob("*.onnx")) < 2e6


def test_settings_by_a_presets_name(bundle_fp32):
    manifest = read_manifest(bundle_fp32).manifest
    assert list(manifest.presets) == ["lightning-8"]
    assert manifest.settings("lightning-8") == manifest.defaults.updated({"sampler": "dpmpp2m", "cfg_scale": (2, 1.5)})
    assert manifest.settings() == manifest.settings("lightning") == manifest.defaults
    with pytest.raises(UsageError, match=r"(?s)no such preset.*lightning, lightning-8.*'fast'"):
        manifest.settings("fast")


@pytest.mark.parametrize("presets", [{"two words": {}}, {"": {}}, {"fast": {"steps": 0}}, {"fast": {"tempo": 1}}, []])
def test_presets_are_checked_with_the_manifest(copy, presets):
    edit_manifest(copy, lambda manifest: manifest.update(presets=presets))
    with pytest.raises(BundleError, match=r"(?s)the manifest is damaged.*presets"):
        read_manifest(copy)


def test_a_bundle_without_presets_opens(copy):
    edit_manifest(copy, lambda manifest: manifest.pop("presets"))
    assert read_manifest(copy).manifest.presets == {}


def flip_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), r"(?s)no bundle here.*build_engines\.py"),
        (lambda path: (path / MANIFEST).unlink(), "no bundle here"),
        (lambda path: (path / MANIFEST).write_text("{"), "the manifest is damaged"),
        (lambda path: (path / MANIFEST).write_text("[]"), "the manifest is damaged"),
        (lambda path: (path / "unet.onnx").unlink(), r"unet\.onnx: a file of the bundle is missing"),
        (lambda path: (path / "weights.safetensors").unlink(), "a file of the bundle is missing"),
        (lambda path: flip_a_byte(path / "weights.safetensors"), "(?s)a file of the bundle was changed.*SHA-256"),
        (lambda path: flip_a_byte(path / "tokenizer.json"), "a file of the bundle was changed"),
        (lambda path: (path / "unet.onnx").write_bytes(b""), "(?s)a file of the bundle was changed.*0 bytes"),
        (lambda path: edit_manifest(path, lambda m: m.update(format=99)), "(?s)another version.*format 6.*format 99"),
        (lambda path: edit_manifest(path, lambda m: m.update(format=99, new=1)), "another version"),
        (lambda path: edit_manifest(path, lambda m: m.update(surprise=1)), "(?s)manifest is damaged.*surprise"),
        (lambda path: edit_manifest(path, lambda m: m.pop("weights")), "(?s)manifest is damaged.*weights"),
        (lambda path: edit_manifest(path, lambda m: m["graphs"].pop("unet")), "wrong set of graphs"),
        (
            lambda path: edit_manifest(path, lambda m: m["weights"].update(name="../secret")),
            "(?s)manifest is damaged.*without a folder",
        ),
    ],
)
def test_a_bundle_that_is_not_as_it_was_built_is_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_the_manifest_alone_opens_without_reading_weights(copy):
    (copy / "weights.safetensors").unlink()
    assert read_manifest(copy).manifest.precision == "fp32"


def test_the_default_place_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RESTORE_BUNDLE", str(tmp_path))
    assert default_bundle_dir() == tmp_path
    monkeypatch.delenv("RESTORE_BUNDLE")
    assert default_bundle_dir().name == "bundle"
