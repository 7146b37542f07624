"""Weights in int8: the integers and scales themselves, the graphs that multiply them out, and bundles of them."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from engine import Restorer
from engine.backends import make_backend
from engine.bundle.manifest import open_bundle
from engine.bundle.verification import relative_l2
from engine.errors import BuildError
from engine.image.files import read_photo
from engine.memory.residency import host_weights
from export.build import int8
from export.build.trial import TRIAL_SYMBOLS, try_graph
from export.build.verify import compare_with_torch
from export.build.weights import WEIGHTS, Weight, plan_layout, write_weights
from export.checkpoint.lora import LoadedLora
from export.checkpoint.safetensors_file import read_safetensors
from export.checkpoint.tensor_files import LazyTensor
from export.graphs import traces
from export.graphs.builder import graph_builders
from export.graphs.definitions import NUMPY_DTYPES, GraphDefinition, example_inputs
from export.graphs.pack import pack

TYPES = ("float32", "float16", "bfloat16")


# -- integers and scales ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
def test_every_value_is_within_half_a_step_and_none_is_cut_off(dtype):
    generator = np.random.default_rng(0)
    values = generator.standard_normal((64, 8, 3, 3), np.float32)
    values *= 10.0 ** generator.uniform(-6, 3, (64, 1, 1, 1)).astype(np.float32)  # down to float16's smallest
    values[5] = 0
    scales = int8.scales_of(values, NUMPY_DTYPES[dtype])
    assert (scales.dtype, scales.shape) == (NUMPY_DTYPES[dtype], (64,))
    integers = int8.quantize(values, scales)
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() <= 127
    steps = scales.astype(np.float64).reshape(-1, 1, 1, 1)
    assert (np.abs(integers * steps - values) <= steps * (0.5 + 1e-4)).all()
    assert (integers[5] == 0).all()
    assert np.isfinite(steps).all()
    # And the steps are no longer than they must be: the type's rounding above max / 127.
    least = np.abs(values.reshape(64, -1)).max(1) / 127
    slack = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype] * least
    assert (np.delete(steps.ravel() - least - slack, 5) <= (6e-8 if dtype == "float16" else 0)).all()


def sources(**values):
    return {name: LazyTensor(name, Path("base"), value.shape, lambda v=value: v) for name, value in values.items()}


def test_loras_are_merged_before_values_are_rounded(tmp_path):
    class Delta:
        def add_to(self, merged, base, scale):
            merged += scale * np.float32(0.001)  # less than half a step of the base alone

    base = np.random.default_rng(0).standard_normal((16, 32), np.float32)
    file, layout = tmp_path / "w.safetensors", plan_layout(Weight("m", "float32", (16, 32)).in_int8())
    stored = {}
    for name, loras in (("without", []), ("with", [LoadedLora("l", Path("l"), 2.0, {"m": Delta()})])):
        write_weights(file, layout, sources(m=base), loras)
        tensors = read_safetensors(file)
        assert set(tensors) == {"m.int8", "m.int8_scale"}
        stored[name] = tensors["m.int8"].read() * tensors["m.int8_scale"].read()[:, None]
    assert np.abs((stored["with"] - stored["without"]).mean() - 0.002) < 5e-4
    assert layout.parameter_bytes("m") == 16 * 32 + 16 * 4


def test_a_weight_that_does_not_fit_the_graphs_type_is_named(tmp_path):
    large = np.full((2, 4), 7e4, np.float32)
    layout = plan_layout(Weight("m", "float16", (2, 4)).in_int8())
    with pytest.raises(BuildError, match="base: m: a weight does not fit float16"):
        write_weights(tmp_path / "w.safetensors", layout, sources(m=large), [])
    write_weights(tmp_path / "w.safetensors", layout, sources(m=large * np.float32(0.9)), [])


# -- graphs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def packed(request, tiny, tmp_path_factory):
    """The graph `text_encoder_2` with its matrices in int8, in each precision."""
    from export.build.build_plan import make_plan
    from export.build.request import BuildRequest

    folder = tmp_path_factory.mktemp(request.param)
    request_ = BuildRequest(
        tiny.sdxl,
        tiny.supir,
        tiny.tokenizer,
        folder / "b",
        preset="lightning",
        precision=request.param,
        weights="int8",
        backend="openvino",
    )
    plan = make_plan(request_)
    write_weights(folder / WEIGHTS, plan.layout, plan.tensors, [])
    definition = plan.graphs["text_encoder_2"].definition
    builder = graph_builders(plan.arch, request.param, definition.end_id)["text_encoder_2"]
    model = pack(traces.shipped_trace(definition).structure, definition.spec, plan.layout.weights)
    file = folder / "text_encoder_2.onnx"
    onnx.save(model, file)
    return builder, file, plan.layout


def test_the_graph_agrees_with_torch_on_the_weights_multiplied_out(packed):
    builder, file, _ = packed
    agreement, _ = compare_with_torch(builder, file, try_graph(builder.definition, file))
    assert agreement.worst < {"fp32": 2e-6, "fp16": 3e-3, "bf16": 3e-3}[builder.spec.precision]
    onnx.checker.check_model(str(file))


def test_scales_along_the_wrong_axis_are_noticed(packed, tmp_path):
    builder, file, _ = packed
    model = onnx.load(file, load_external_data=False)
    square = {t.name for t in model.graph.initializer if t.name.endswith(int8.VALUES) and t.dims[0] == t.dims[1]}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in square:
            node.attribute[0].i = 1
    (tmp_path / WEIGHTS).write_bytes((file.parent / WEIGHTS).read_bytes())
    onnx.save(model, tmp_path / file.name)
    with pytest.raises(BuildError, match="disagrees with its torch module"):
        compare_with_torch(builder, tmp_path / file.name, try_graph(builder.definition, tmp_path / file.name))


def test_matrices_are_in_int8_and_tables_of_embeddings_norms_and_biases_are_not(packed):
    builder, file, layout = packed
    graph = onnx.load(file, load_external_data=False).graph
    narrow = {tensor.name.removesuffix(int8.VALUES) for tensor in graph.initializer if tensor.data_type == 3}
    wide = {tensor.name for tensor in graph.initializer} & set(builder.parameters)
    assert {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"} == narrow
    assert narrow | wide == set(builder.parameters)
    assert all(name.endswith((".bias", "_embedding.weight")) or "layer_norm" in name for name in wide)
    assert not any(name.startswith("vae.") and name.endswith(int8.VALUES) for name in layout.weights)


# -- bundles ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle_int8(build_bundle, once):
    return once("int8", partial(build_bundle, weights="int8"))


def psnr(first, second):
    return -10 * np.log10(np.mean((first - second) ** 2))


def test_a_photo_is_restored_to_what_weights_of_full_precision_make_of_it(bundle_int8, bundle_fp32, photo_path):
    photo = read_photo(photo_path).rgb[:64, :64]
    results = []
    for bundle in (bundle_fp32, bundle_int8):
        with Restorer.open(bundle, backend="onnxruntime", threads=1) as restorer:
            results.append(restorer.restore(photo, min_size=64, steps=2).photo.rgb)
    assert 40 < psnr(*results) < 80  # 58 dB; and the weights in int8 were used


@pytest.mark.parametrize("graph", ["controlnet", "unet"])
def test_openvino_and_onnx_runtime_multiply_out_alike(bundle_int8, bundle_fp32, graph):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    small = open_bundle(bundle_int8)
    inputs = example_inputs(GraphDefinition(small.spec(graph), None), TRIAL_SYMBOLS, 0)
    found = {}
    for name, bundle, backend in (
        ("ov", small, make_backend("openvino", threads=1, compute="fp32")),
        ("ort", small, make_backend("onnxruntime", threads=1)),
        ("fp32", open_bundle(bundle_fp32), make_backend("onnxruntime", threads=1)),
    ):
        runner = backend.open(bundle, graph)
        found[name] = runner.infer(inputs)
        runner.close()
    for output in found["ort"]:
        assert relative_l2(found["ov"][output], found["ort"][output]) < 2e-5
        assert 1e-4 < relative_l2(found["fp32"][output], found["ort"][output]) < 5e-2


def test_the_manifest_says_so_and_memory_is_counted_as_if_multiplied_out(bundle_int8, bundle_fp32):
    small, large = open_bundle(bundle_int8), open_bundle(bundle_fp32)
    assert {name for name, graph in small.manifest.graphs.items() if not graph.weights_in_int8} == set(small.vae_graphs)
    assert not any(graph.weights_in_int8 for graph in large.manifest.graphs.values())
    assert small.manifest.graphs["unet"].weights_bytes < 0.3 * large.manifest.graphs["unet"].weights_bytes
    assert small.manifest.weights.bytes < 0.7 * large.manifest.weights.bytes
    counted, whole = host_weights(small), host_weights(large)
    assert all(counted[name] >= whole[name] for name in whole)
    assert counted["unet"] < 1.1 * whole["unet"]


def test_a_dry_run_tells_it(run_build, tmp_path):
    asked = ("--weights", "int8", "--dry-run", "--output", tmp_path / "b")
    said = run_build(*asked)
    assert said.returncode == 0, said.stderr
    assert "fp32, weights in int8, onnxruntime" in said.stdout
    write = {option: json.loads(run_build(*option, "--json").stdout)["write"] for option in (asked, asked[2:])}
    (small, large) = write.values()
    assert small["parameters"] == large["parameters"]
    assert small["weights_bytes"] < 0.6 * large["weights_bytes"]
