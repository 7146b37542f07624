"""The command that finds the layer where two ways of computing a network part."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from conftest import DATA

pytest.importorskip("polygraphy", reason="needs the compare extra")
pytest.importorskip("torch", reason="needs the export extra")

from benchmarks.compare.capture import capture
from benchmarks.compare.command import main
from benchmarks.compare.graphs import load_graph, round_to
from benchmarks.compare.layerwise import Limits, Side, compare_layers, run_layers
from benchmarks.compare.matching import is_float_cast, match
from benchmarks.compare.ways import WAYS
from engine.backends.ort import OrtBackend
from engine.bundle.manifest import open_bundle
from engine.cli.console import run_command
from export.checkpoint.safetensors_file import read_safetensors

PHOTO = str(DATA / "coffee.jpg")
#: The demo's smallest graph with more than one block.
SMALL = ("--graph", "text_encoder_2", "--min-size", "64", "--threads", "1", "--quiet")
#: Modules of it: one whose result is added to others', and one whose result a norm takes in the end.
SCALED, OVERFLOWING = (f"text_encoder_2.encoder.layers.{place}" for place in ("0.self_attn.out_proj", "1.mlp.fc1"))


def planted(bundle, folder, factors):
    """Copy a bundle and multiply some of its parameters."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / manifest["weights"]["name"]
    stored = read_safetensors(file)
    content = bytearray(file.read_bytes())
    for name, factor in factors.items():
        values = stored[name].read()
        start = stored[name].offset
        content[start : start + values.nbytes] = (values * np.float32(factor)).astype(values.dtype).tobytes()
    file.write_bytes(content)
    manifest["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def report_of(file):
    (graph,) = json.loads(file.read_text())["graphs"]
    return graph, {layer["name"]: layer for layer in graph["layers"]}


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    return open_bundle(demo_bundle)


@pytest.fixture(scope="module")
def captured(bundle):
    """Inputs of three of the demo's graphs, of ControlNet and UNet in the second step."""
    graphs = ["text_encoder", "controlnet", "unet"]
    return capture(bundle, DATA / "coffee.jpg", graphs, 2, {"min_size": 64, "steps": 2}, threads=1)


def sides(bundle, captured, graph, *names):
    shapes = {name: array.shape for name, array in captured[graph].inputs.items()}
    ways = [WAYS[name] for name in names]
    return [Side(load_graph(bundle, graph, way.precision_of("fp32"), shapes), way, 1) for way in ways]


def test_nothing_is_found_in_a_sound_bundle(demo_bundle, tmp_path, capsys):
    file = tmp_path / "layers.json"
    assert main([PHOTO, "--bundle", str(demo_bundle), "--json", str(file), *SMALL]) == 0
    assert "text_encoder_2, text: onnxruntime-fp16 against onnxruntime-fp32" in (out := capsys.readouterr().out)
    assert "nothing is beyond a bound" in out
    graph, layers = report_of(file)
    assert graph["agrees"]
    assert not graph["off_by_itself"]
    # Rounding to fp16 shows, a layer for a layer, and is no more than that.
    own = [layer["own"] for layer in layers.values() if layer["operator"] == "MatMul"]
    assert all(1e-4 < error < 6e-4 for error in own)


def test_a_scale_that_is_off_by_1_percent_is_found_by_its_layers_name(demo_bundle, tmp_path, capsys):
    other, file = planted(demo_bundle, tmp_path / "planted", {f"{SCALED}.weight": 1.01}), tmp_path / "layers.json"
    bundles = ["--bundle", str(demo_bundle), "--other-bundle", str(other)]
    assert main([PHOTO, *bundles, "--ways", "onnxruntime", "onnxruntime", "--json", str(file), *SMALL]) == 1
    graph, layers = report_of(file)
    (name,) = graph["off_by_itself"]
    assert layers[name]["place"] == SCALED
    assert 5e-3 < layers[name]["own"] < 1.1e-2  # the bias was not scaled
    assert f"off by itself: {name} ({SCALED})" in capsys.readouterr().out
    # Later layers differ too, none by its own fault.
    after = [layer for layer in layers.values() if layer["index"] > layers[name]["index"]]
    assert max(layer["error"] for layer in after) > 1e-4
    assert max(layer["own"] for layer in after) < 1e-5


def test_an_overflow_in_fp16_is_found_by_its_layers_name(demo_bundle, tmp_path, capsys):
    harmed = planted(demo_bundle, tmp_path / "planted", {f"{OVERFLOWING}.weight": 3e5})
    files = ["--html", str(tmp_path / "layers.html"), "--json", str(tmp_path / "layers.json")]
    assert main([PHOTO, "--bundle", str(harmed), *files, *SMALL]) == 1
    graph, layers = report_of(tmp_path / "layers.json")
    first = graph["first_not_finite"]
    assert layers[first]["place"] == OVERFLOWING
    assert graph["off_by_itself"][0] == first
    assert [name for name, layer in layers.items() if layer["breaks"]] == [first]
    assert layers[first]["own_spread"]["infinities"] > 0
    assert first in graph["beyond_fp16"]
    out = capsys.readouterr().out
    assert f"breaks: {first} ({OVERFLOWING}) makes " in out
    assert "fp16 holds 65504" in out
    page = (tmp_path / "layers.html").read_text()
    assert page.count("<tr class='found'>") >= 1
    assert page.count("<tr") == len(graph["layers"]) + 1
    assert "http" not in page.replace("http-equiv", "")


def test_an_overflow_is_foreseen_where_nothing_is_computed_in_fp16(demo_bundle, tmp_path, capsys):
    harmed = planted(demo_bundle, tmp_path / "planted", {f"{OVERFLOWING}.weight": 3e5})
    ways = ["--ways", "onnxruntime", "onnxruntime-fp32"]
    assert main([PHOTO, "--bundle", str(harmed), *ways, *SMALL]) == 0
    assert f"({OVERFLOWING})" in capsys.readouterr().out.split("beyond fp16: ")[1].split("\n")[0]


@pytest.mark.slow
def test_mistakes_are_found_in_the_depth_of_the_unet(demo_bundle, tmp_path):
    """A scale that is off by 1 % in one layer, and an overflow in fp16 in another."""
    scaled, overflowing = "unet.up_blocks.1.resnets.0.conv2", "unet.down_blocks.1.resnets.0.conv1"
    factors = {f"{scaled}.weight": 1.01, f"{overflowing}.weight": 1e5}
    other, file = planted(demo_bundle, tmp_path / "planted", factors), tmp_path / "layers.json"
    known = planted(demo_bundle, tmp_path / "known", {f"{overflowing}.weight": 1e5})
    bundles = ["--bundle", str(known), "--other-bundle", str(other)]
    small = ["--min-size", "64", "--steps", "2", "--step", "2", "--threads", "1", "--quiet"]
    assert main([PHOTO, *bundles, "--graph", "unet", "--json", str(file), *small]) == 1
    graph, layers = report_of(file)
    assert [layers[name]["place"] for name in graph["off_by_itself"][:2]] == [overflowing, scaled]
    assert layers[graph["off_by_itself"][0]]["breaks"]


def test_bundles_of_two_precisions_have_the_same_layers(bundle_fp32, bundle_fp16, capsys):
    bundles = ["--bundle", str(bundle_fp32), "--other-bundle", str(bundle_fp16), "--graph", "text_encoder"]
    assert (
        main([PHOTO, *bundles, "--ways", "onnxruntime", "onnxruntime", "--min-size", "64", "--threads", "1", "--quiet"])
        == 0
    )
    assert "text_encoder, text: onnx" in capsys.readouterr().out


def test_the_inputs_are_those_of_the_engines_own_run(bundle, captured):
    assert [each.stage for each in captured.values()][1:] == ["step 2", "step 2"]
    controls = OrtBackend(threads=1).open(bundle, "controlnet").infer(captured["controlnet"].inputs)
    for name, value in controls.items():
        np.testing.assert_allclose(value, captured["unet"].inputs[name], rtol=1e-5, atol=1e-6)
    first = capture(bundle, DATA / "coffee.jpg", ["unet"], 1, {"min_size": 64, "steps": 2}, threads=1)["unet"]
    assert first.inputs["timestep"][0] > captured["unet"].inputs["timestep"][0]
    assert np.abs(first.inputs["x"] - captured["unet"].inputs["x"]).max() > 0.1


def test_groups_of_layers_give_what_the_whole_graph_gives(bundle, captured):
    reference, examined = sides(bundle, captured, "text_encoder", "onnxruntime-fp32", "onnxruntime-fp16")
    inputs = captured["text_encoder"].inputs
    whole, parts = (
        compare_layers(reference, examined, inputs, "", Limits(group_bytes=size)) for size in (1 << 30, 1 << 17)
    )
    assert whole.groups == 1
    assert parts.groups > 10
    assert [layer.name for layer in parts.layers] == [layer.name for layer in whole.layers]
    for one, other in zip(parts.layers, whole.layers, strict=True):
        assert one.own == pytest.approx(other.own, rel=1e-2, abs=1e-6)
        assert one.error == pytest.approx(other.error, rel=1e-2, abs=1e-5)


def test_layers_in_a_chain_give_the_graphs_outputs(bundle, captured):
    """What the layers come to is what the engine's runner gives."""
    inputs = captured["controlnet"].inputs
    (side,) = sides(bundle, captured, "controlnet", "onnxruntime")
    expected = OrtBackend(threads=1).open(bundle, "controlnet").infer(inputs)["control_9"]
    found = run_layers(side, side.graph.layers, dict(inputs))["control_9"]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("graph", ["text_encoder", "controlnet", "unet"])
def test_every_layer_has_its_counterpart_in_another_precision(bundle, captured, graph):
    wide, half = (side.graph for side in sides(bundle, captured, graph, "onnxruntime-fp32", "onnxruntime-fp16"))
    found = match(half, wide)
    assert len(half.layers) > len(wide.layers)  # by its casts
    assert sorted(found.layers.values()) == list(range(len(wide.layers)))
    for index, layer in enumerate(half.layers):
        if is_float_cast(half, layer):
            continue
        other = wide.layers[found.layers[index]]
        assert (layer.op_type, half.place(layer)) == (other.op_type, wide.place(other))
        assert half.sizes.shapes[layer.output[0]] == wide.sizes.shapes[other.output[0]]


def test_results_are_rounded_to_the_type_of_their_layer(bundle, captured):
    (side,) = sides(bundle, captured, "text_encoder", "onnxruntime-fp16")
    for tensor, value in run_layers(side, side.graph.layers, dict(captured["text_encoder"].inputs)).items():
        np.testing.assert_array_equal(value, round_to(value, side.type_of(tensor)), err_msg=tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--graph", "vae"], "--graph: no such graph"),
        (["--step", "99"], "--step: the restoration has no such step"),
        (["--bundle", "nowhere"], "nowhere: no bundle here"),
        (["--ways", "onnxruntime", "tensorrt-rtx"], "the driver of NVIDIA's GPUs|no GPU|driver"),
        (["--ways", "tensorrt", "tensorrt-rtx"], "one process runs either TensorRT or TensorRT-RTX"),
        (["--ways", "onnxruntime", "onnxruntime"], "--ways: the two ways are one"),
        (["--html", "/proc/page.html"], "/proc: cannot write the page"),
        (["--html", "missing/page.html"], "missing: no such folder"),
        (["--html", "page.txt"], "page.txt: no name of a page"),
        (["--json", "missing/layers.json"], "missing: cannot write the report: no such folder"),
        (["--graph", "vae_encoder", "--steps", "1"], "vae_encoder: this restoration does not run the graph"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_sentence(arguments, message, bundle_fp32, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = run_command(
        main, [PHOTO, "--bundle", str(bundle_fp32), "--min-size", "64", "--threads", "1", "--quiet", *arguments]
    )
    told = capsys.readouterr()
    assert status in (1, 2), told.err
    assert "Traceback" not in told.err
    assert not told.out
    head = told.err.split("\n")[0]
    assert head.startswith("error: ")
    assert re.search(message, head), told.err


def test_bundles_of_different_networks_are_not_compared(bundle_fp32, demo_bundle, capsys):
    bundles = ["--bundle", str(bundle_fp32), "--other-bundle", str(demo_bundle)]
    assert run_command(main, [PHOTO, *bundles, *SMALL]) == 2
    told = capsys.readouterr().err
    assert "the two bundles are of different architectures" in told
    assert "text_encoder_2: " in told.split("\n")[0]
