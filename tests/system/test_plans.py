"""Plans, compiled for real by TensorRT-RTX, which needs no GPU for it."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")

from conftest import ROOT, Silent
from onnx import helper

from engine import Restorer
from engine.backends.trt_library import TrtLibrary, open_library
from engine.backends.trt_plan import check_plan
from engine.bundle.files import describe_file
from engine.bundle.graphspec import GraphSpec, TensorSpec
from engine.bundle.manifest import Audit, Bundle, TrtEngine, open_bundle, plan_key
from engine.bundle.profiles import Profile, Range
from engine.errors import BackendError, BuildError, BundleError, UsageError
from export.build import steps as build_module
from export.build.build_plan import make_plan
from export.build.request import BuildRequest, LoraRequest
from export.build.steps import build
from export.build.weights import Weight, plan_layout, write_weights
from export.checkpoint.tensor_files import LazyTensor
from export.graphs.pack import pack
from export.trt import compile as plans_module
from export.trt.audit import audit, heavy_layers
from export.trt.compile import PlanOptions, check_targets, compile_plan, known_targets

GRAPHS = 7


@pytest.fixture(scope="module")
def library():
    return open_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def build_plans(build_bundle, tmp_path_factory):
    def run(**changes):
        fields = {"backend": "tensorrt-rtx", "precision": "fp16", "targets": ("8.9",), "shapes": "64,64-128"}
        return build_bundle(tmp_path_factory.mktemp("plans") / "bundle", **{**fields, **changes})

    return run


@pytest.fixture(scope="module")
def planned(build_plans):
    return open_bundle(build_plans())


@pytest.fixture
def text_graph(planned, tmp_path):
    """The smallest graph with its weights, to be broken; and how to compile it."""
    entry = planned.manifest.graphs["text_encoder"]
    for file in (entry.file, planned.manifest.weights):
        shutil.copy(planned.file(file), tmp_path)
    return SimpleNamespace(entry=entry, file=tmp_path / entry.file.name, folder=tmp_path)


def recompile(text_graph, planned, library):
    plan = text_graph.entry.plan
    options = PlanOptions(library, plan.targets, None, {"text_encoder": plan.profiles}, weight_stripped=False)
    return compile_plan(text_graph.entry, text_graph.folder, planned.manifest.weights, options)


def test_a_full_disk_is_told(text_graph, planned, library):
    (text_graph.folder / "text_encoder.plan").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        recompile(text_graph, planned, library)


# -- what is compiled -----------------------------------------------------------------------------


def test_every_graph_of_the_reference_model_becomes_a_plan(planned, library):
    for name, graph in planned.manifest.graphs.items():
        plan = graph.plan
        assert plan.file.bytes > 10_000
        assert (plan.library, plan.targets, plan.device, plan.weight_stripped) == (library.label, ("8.9",), None, False)
        assert len(plan.profiles) == (1 if name.startswith("text") else 2)
        assert plan.audit.share_16_bit >= 0.95, name
    precisions = {name: graph.spec.precision for name, graph in planned.manifest.graphs.items()}
    assert {precisions[name] for name in ("unet", "controlnet", "text_encoder", "text_encoder_2")} == {"fp16"}
    assert {precisions[name] for name in ("vae_encoder", "vae_decoder", "denoise_encoder")} == {"bf16"}
    kinds = {name: set(graph.plan.audit.flops) for name, graph in planned.manifest.graphs.items()}
    assert kinds["unet"] == {"half"}
    assert kinds["vae_decoder"] == {"bf16"}


def test_weights_in_int8_are_so_in_the_plan(library, tmp_path):
    """A product with a matrix of 4 MiB in float16, as `pack` writes it: its plan is of half the size."""
    spec = GraphSpec(
        name="product",
        role="text",
        precision="fp16",
        inputs=(TensorSpec(name="x", dtype="float16", shape=("B", 1024)),),
        outputs=(TensorSpec(name="y", dtype="float16", shape=("B", 2048)),),
        multiples={},
    )
    x, y, m = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, shape)
        for name, shape in (("x", ["B", 1024]), ("y", ["B", 2048]), ("m", [2048, 1024]))
    )
    nodes = [helper.make_node("Transpose", ["m"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])]
    structure = helper.make_model(
        helper.make_graph(nodes, "product", [x, m], [y]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    values = np.random.default_rng(0).standard_normal((2048, 1024), np.float32)
    source = {"m": LazyTensor("m", tmp_path, values.shape, lambda: values)}
    profile = Profile(ranges={"B": Range(1, 1, 1)})
    options = PlanOptions(library, ("8.9",), None, {"product": (profile,)}, weight_stripped=False)
    sizes = []
    for weights in (Weight("m", "float16", values.shape).in_int8(), (Weight("m", "float16", values.shape),)):
        layout = plan_layout(weights)
        write_weights(tmp_path / "weights.safetensors", layout, source, [])
        onnx.save(pack(structure, spec, layout.weights), tmp_path / "product.onnx")
        graph = SimpleNamespace(spec=spec, file=describe_file(tmp_path / "product.onnx"))
        plan = compile_plan(graph, tmp_path, describe_file(tmp_path / "weights.safetensors"), options)
        assert plan.audit.share_16_bit == 1
        sizes.append(plan.file.bytes)
    assert sizes[1] - sizes[0] > 0.9 * 2048 * 1024


@pytest.mark.slow
def test_float32_is_compiled_too(build_plans):
    wide = open_bundle(build_plans(precision="fp32", shapes="64"))  # one size: what is asked is the type
    assert {graph.plan.audit.share_16_bit for graph in wide.manifest.graphs.values()} == {0.0}


def test_the_oldest_target_has_no_bfloat16(tmp_path):
    old = make_plan(_request(tmp_path / "old", targets=("7.5",)))
    assert old.graphs["vae_decoder"].definition.spec.precision == "fp32"
    assert old.graphs["unet"].definition.spec.precision == "fp16"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_graph_of_the_demo_becomes_a_plan_with_one_command(run_build, tmp_path, precision):
    """For all the default GPUs, at a fixed size and over a range."""
    started = time.monotonic()
    done = run_build(
        "--backend", "tensorrt-rtx", "--precision", precision, "--output", tmp_path / "b", "--json", "--quiet"
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    print(f"\n{precision}: {seconds:.0f} s")
    graphs = json.loads(done.stdout)["manifest"]["graphs"]
    assert len(graphs) == GRAPHS
    for name, graph in graphs.items():
        assert graph["plan"]["targets"] == ["8.6", "8.9", "12.0"]
        assert len(graph["plan"]["profiles"]) == (1 if name.startswith("text") else 2)
        assert graph["plan"]["audit"]["share_16_bit"] >= (0.95 if precision == "fp16" else 0.0), name
    if precision == "fp16":  # what plans are in by default
        assert seconds < 180


def _request(output, **changes):
    from synthetic import tiny_files

    tiny = tiny_files()
    fields = {
        "sdxl": tiny.sdxl,
        "supir": tiny.supir,
        "tokenizer": tiny.tokenizer,
        "preset": "lightning",
        "settings": {"min_size": 64, "steps": 3},
        "backend": "tensorrt-rtx",
        "precision": "fp16",
    }
    return BuildRequest(output=output, **{**fields, **changes})


def test_flops_are_what_the_sizes_say(planned, library):
    """CLIP-L's tower by hand: four projections, two products of attention and the MLP, but for its last layer."""
    arch = make_plan(_request(planned.path.parent / "none")).arch.text_encoder
    tokens, width = 77, arch.width
    layer = 2 * tokens * width * (4 * width + 2 * tokens + 2 * arch.mlp_channels)
    found = sum(planned.manifest.graphs["text_encoder"].plan.audit.flops.values())
    assert found == 2 * (arch.layers - 1) * layer  # a batch of two


def test_the_bundle_runs_nowhere_without_a_gpu_and_says_what_would(planned, photo_path, run_restore, tmp_path):
    if _has_gpu():
        pytest.skip("gpu: there is one here")
    done = run_restore(photo_path, "-o", tmp_path / "out.png", "--bundle", planned.path)
    assert done.returncode == 1
    assert "running on a GPU needs an NVIDIA GPU with its driver" in done.stderr
    assert "--backend onnxruntime" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.png").exists()


def _has_gpu():
    from engine.device.cuda import device_info

    try:
        return bool(device_info(0))
    except BackendError:
        return False


# -- keys and refusals ----------------------------------------------------------------------------


def test_a_key_depends_on_all_that_a_plan_does(planned):
    graph = planned.manifest.graphs["unet"]
    plan = graph.plan
    parts = {
        "library": plan.library,
        "targets": plan.targets,
        "device": None,
        "profiles": plan.profiles,
        "flags": plan.flags,
        "precision": "fp16",
    }
    files = {"graph": graph.file, "weights": planned.manifest.weights}

    def key(**changes):
        now = {**files, **parts, **changes}
        return plan_key(now.pop("graph"), now.pop("weights"), **now)

    assert key() == plan.key
    others = [
        key(graph=planned.manifest.weights),
        key(weights=graph.file),
        key(weights=None),
        key(library="tensorrt-rtx 9"),
        key(targets=("8.6",)),
        key(device="a GPU"),
        key(profiles=plan.profiles[:1]),
        key(flags=("REFIT",)),
        key(precision="fp32"),
    ]
    assert len({plan.key, *others}) == len(others) + 1


GPU = SimpleNamespace(name="NVIDIA RTX 4090", compute_capability="8.9")


def test_the_plan_for_this_library_and_gpu_is_taken(planned, library):
    graph = planned.manifest.graphs["unet"]
    assert check_plan(planned, graph, library, GPU) is graph.plan


@pytest.mark.parametrize(
    ("change", "problem", "fix"),
    [
        ({"library": "tensorrt-rtx 1.0"}, "belongs to another library", "--backend tensorrt-rtx"),
        ({"targets": ("12.0",)}, "the plan is not for this GPU", "--compute-capability 8.9"),
        ({"device": "NVIDIA H200"}, "the plan is not for this GPU", "build it again"),
        ({"flags": ("REFIT",)}, "compiled from something else", "build it again"),
        ({"key": "0" * 64}, "compiled from something else", "build it again"),
    ],
)
def test_a_plan_that_does_not_belong_here_is_refused_with_the_command(planned, library, change, problem, fix):
    graph = planned.manifest.graphs["unet"]
    graph = graph.model_copy(update={"plan": graph.plan.model_copy(update=change)})
    with pytest.raises(BundleError, match=problem) as caught:
        check_plan(planned, graph, library, GPU)
    assert fix in str(caught.value)
    assert f"--output {planned.path}" in str(caught.value)


def test_a_plan_of_other_weights_or_of_none_is_refused(planned, bundle_fp16, library):
    other = planned.manifest.model_copy(update={"weights": planned.manifest.tokenizer.file})
    with pytest.raises(BundleError, match="compiled from something else"):
        check_plan(Bundle(planned.path, other, ""), planned.manifest.graphs["unet"], library, GPU)
    plain = open_bundle(bundle_fp16)
    with pytest.raises(BundleError, match="holds no plans"):
        check_plan(plain, plain.manifest.graphs["unet"], library, GPU)


def test_a_changed_plan_is_noticed_when_the_bundle_is_opened(planned, tmp_path):
    copy = shutil.copytree(planned.path, tmp_path / "copy")
    file = copy / "unet.plan"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"unet\.plan: a file of the bundle was changed"):
        open_bundle(copy)


# -- broken graphs --------------------------------------------------------------------------------


def test_mixed_types_are_refused_with_the_node_and_the_graph(text_graph, planned, library):
    model = onnx.load(text_graph.file, load_external_data=False)
    index, node = next((i, node) for i, node in enumerate(model.graph.node) if node.op_type == "MatMul")
    cast = helper.make_node("Cast", [node.input[0]], ["wide"], name="a_wrong_cast", to=onnx.TensorProto.FLOAT)
    node.input[0] = "wide"
    model.graph.node.insert(index, cast)
    onnx.save(model, text_graph.file)
    with pytest.raises(BuildError) as caught:
        recompile(text_graph, planned, library)
    assert str(caught.value.where).startswith("text_encoder: ")
    assert node.name in str(caught.value)


def test_a_wrong_name_type_or_shape_is_refused_with_the_tensor_and_the_graph(text_graph, planned, library):
    for change, words in (
        (lambda graph: _rename(graph, "hidden", "latent"), "text_encoder: wrong outputs in the graph"),
        (lambda graph: _resize(graph.input[0], 1, 76), "text_encoder: node_add_"),
        (lambda graph: _retype(graph.input[0]), "text_encoder.input_ids: wrong dtype of an input"),
    ):
        model = onnx.load(planned.file(text_graph.entry.file), load_external_data=False)
        change(model.graph)
        onnx.save(model, text_graph.file)
        with pytest.raises(BuildError, match=words):
            recompile(text_graph, planned, library)


def _rename(graph, old, new):
    next(value for value in graph.output if value.name == old).name = new
    for node in graph.node:
        node.output[:] = [new if name == old else name for name in node.output]


def _resize(value, axis, size):
    value.type.tensor_type.shape.dim[axis].dim_value = size


def _retype(value):
    value.type.tensor_type.elem_type = onnx.TensorProto.INT32


def test_a_file_that_is_no_graph_is_told(text_graph, planned, library):
    text_graph.file.write_bytes(b"no graph at all")
    with pytest.raises(BuildError, match="text_encoder"):
        recompile(text_graph, planned, library)


def test_work_in_float32_fails_a_16_bit_build_by_the_layer(bundle_fp32, library):
    """As it was seen on TensorRT 11, where an old flag silently gave float32."""
    from export.trt.compile import _Compiler

    wide = open_bundle(bundle_fp32)
    spec = wide.spec("text_encoder").model_copy(update={"precision": "fp16"})
    compiler = _Compiler(library, wide.spec("text_encoder"), wide.path)
    with pytest.raises(BuildError, match="too much of the graph's work is in float32") as caught:
        audit(heavy_layers(library.api, compiler.network, spec), spec)
    assert caught.value.where.startswith("text_encoder: ")
    assert caught.value.found == "0.0%"


def test_a_plan_that_opens_here_is_asked_itself(text_graph, planned, library, monkeypatch):
    """With a GPU that the plan is for; its word counts more than the graph's."""
    plan = text_graph.entry.plan
    asked = []

    def inspect(engine_of, file):
        asked.append((engine_of.label, file.name, file.stat().st_size > 10_000))
        return told

    def compile_here(gpu):
        options = PlanOptions(library, plan.targets, None, {"text_encoder": plan.profiles}, False, gpu=gpu)
        return compile_plan(text_graph.entry, text_graph.folder, planned.manifest.weights, options).audit

    monkeypatch.setattr(plans_module, "inspect_plan", inspect)
    spec = text_graph.entry.spec
    layers = heavy_layers(library.api, plans_module._Compiler(library, spec, text_graph.folder).network, spec)
    nodes = {node.name for node in onnx.load(text_graph.file, load_external_data=False).graph.node}
    assert {layer.node for layer in layers} <= nodes  # what the inspector names them by
    told = {}
    assert compile_here("12.0").inspected_share == 0.0  # a GPU that this plan is not for
    assert asked == []
    told = {layer.node: "half" for layer in layers[:-1]}
    assert 0.5 < compile_here("8.9").inspected_share < 1.0
    assert asked == [(library.label, "text_encoder.plan", True)]
    told = {layer.node: "float" for layer in layers[:2]}
    with pytest.raises(BuildError, match="too much of the graph's work is in float32"):
        compile_here("8.9")


# -- weights on the host --------------------------------------------------------------------------


def test_plans_whose_weights_can_be_streamed_are_compiled_here_and_say_so(text_graph, planned, library):
    plan = text_graph.entry.plan
    options = PlanOptions(library, plan.targets, None, {"text_encoder": plan.profiles}, False, weight_streaming=True)
    found = compile_plan(text_graph.entry, text_graph.folder, planned.manifest.weights, options)
    assert found.flags == ("WEIGHT_STREAMING",)  # RTX refuses it together with memory that only we allocate
    assert plan.flags == ("REQUIRE_USER_ALLOCATION",)
    assert found.key != plan.key
    assert found.file.bytes > text_graph.entry.weights_bytes


# -- weight-stripped plans ------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch, library):
    """A GPU that is not there, and a compiler that only writes down: RTX needs a GPU for such plans."""
    from engine.device import cuda

    compiled = []

    def write(graph, folder, weights, options):
        compiled.append(graph.spec.name)
        file = folder / f"{graph.spec.name}.plan"
        file.write_bytes(b"a plan without weights")
        share = Audit(flops={"half": 1}, share_16_bit=1.0, symbols={})
        return TrtEngine(
            file=describe_file(file),
            library=options.library.label,
            targets=options.targets,
            device=options.device,
            profiles=options.profiles[graph.spec.name],
            weight_stripped=True,
            flags=options.flags,
            audit=share,
            key=options.key(graph, weights),
        )

    monkeypatch.setattr(cuda, "device_info", lambda index: cuda.DeviceInfo("a GPU", "8.9", 1 << 34))
    monkeypatch.setattr(build_module, "compile_plan", write)
    return compiled


def test_another_lora_takes_weightless_plans_over_and_changes_the_weights(pretend, tmp_path, tiny):
    options = {"weight_stripped": True, "shapes": "64-192", "precision": "fp32"}
    build(make_plan(_request(tmp_path / "b", **options)), Silent(), lambda line: None)
    bundle = open_bundle(tmp_path / "b")
    before = bundle.manifest
    assert len(pretend) == GRAPHS
    for graph in before.graphs.values():
        assert graph.plan.flags[-2:] == ("REFIT", "STRIP_PLAN")
        with np.load(bundle.file(graph.parity_sample)) as parity_sample:
            outputs = {f"expected {tensor.name}" for tensor in graph.spec.outputs}
            assert set(parity_sample) == {tensor.name for tensor in graph.spec.inputs} | outputs
            assert all(np.abs(parity_sample[name]).max() > 0 for name in outputs)
    face = LoraRequest("face", tiny.loras["face"], 0.5)
    request = _request(tmp_path / "b", preset="lightning-lora", loras=(face,), **options)
    assert build(make_plan(request), Silent(), lambda line: None).status == "built"
    after = open_bundle(tmp_path / "b").manifest
    assert len(pretend) == GRAPHS
    assert after.weights.sha256 != before.weights.sha256
    assert after.graphs["unet"].parity_sample.sha256 != before.graphs["unet"].parity_sample.sha256
    assert all(graph.plan == before.graphs[name].plan for name, graph in after.graphs.items())


def test_plans_with_weights_are_compiled_again_for_other_weights(planned):
    """Their key holds the weights' hash."""
    graph, weights = planned.manifest.graphs["unet"], planned.manifest.weights
    plan = graph.plan
    other = weights.model_copy(update={"sha256": "0" * 64})
    options = PlanOptions(open_library("tensorrt-rtx"), plan.targets, None, {"unet": plan.profiles}, False)
    weight_stripped = dataclasses.replace(options, weight_stripped=True)
    assert options.key(graph, weights) == plan.key != options.key(graph, other)
    assert weight_stripped.key(graph, weights) == weight_stripped.key(graph, other)


def test_weightless_plans_need_the_gpu_that_they_are_for(tmp_path):
    if _has_gpu():
        pytest.skip("gpu: there is one here")
    with pytest.raises(BackendError, match="running on a GPU needs an NVIDIA GPU with its driver"):
        make_plan(_request(tmp_path / "b", weight_stripped=True))
    with pytest.raises(UsageError, match="are compiled for the GPU at hand"):
        make_plan(_request(tmp_path / "b", weight_stripped=True, targets=("8.9",)))


def test_weightless_plans_need_a_size_at_which_they_can_be_checked(pretend, tmp_path):
    with pytest.raises(UsageError, match="weight-stripped plans are checked at a small size"):
        make_plan(_request(tmp_path / "b", weight_stripped=True, shapes="512"))


# -- building -------------------------------------------------------------------------------------


def test_a_stopped_build_goes_on_behind_its_last_plan(tmp_path, monkeypatch, build_plans):
    compiled = []
    compile_one = build_module.compile_plan

    def stop_at_the_third(graph, *rest):
        if len(compiled) == 2 and "stopped" not in compiled:
            compiled.append("stopped")
            raise KeyboardInterrupt
        compiled.append(graph.spec.name)
        return compile_one(graph, *rest)

    monkeypatch.setattr(build_module, "compile_plan", stop_at_the_third)
    request = _request(tmp_path / "b", targets=("8.9",), shapes="64")
    with pytest.raises(KeyboardInterrupt):
        build(make_plan(request), Silent(), lambda line: None)
    said = []
    result = build(make_plan(request), Silent(), said.append)
    assert "goes on behind: weights.safetensors, text_encoder, text_encoder_2" in said
    assert result.resumed == ("weights.safetensors", "text_encoder", "text_encoder_2")
    assert len(compiled) == GRAPHS + 1
    assert all(graph.plan is not None for graph in open_bundle(tmp_path / "b").manifest.graphs.values())


def test_ctrl_c_is_heard_while_a_plan_is_compiled(planned, tmp_path):
    code = f"""
import io
import sys
sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
from engine.backends.trt_library import open_library
from engine.bundle.manifest import open_bundle
from export.trt.compile import PlanOptions, _Compiler
bundle = open_bundle(Path({str(planned.path)!r}))
graph = bundle.manifest.graphs["unet"]
library = open_library("tensorrt-rtx")
options = PlanOptions(library, ("8.6", "8.9", "12.0"), None, {{"unet": graph.plan.profiles * 8}}, False)
compiler = _Compiler(library, graph.spec, bundle.path)
print("compiling", flush=True)
compiler.compile(options, io.BytesIO())
print("done", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "compiling\n"
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "done" not in out
    assert "KeyboardInterrupt" in err


def test_what_can_be_compiled_for_is_asked_of_the_library(library):
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(known_targets(library))
    assert check_targets(library, ["12.0", "8.6", "8.6"]) == ("8.6", "12.0")
    with pytest.raises(UsageError, match=r"--compute-capability: no such target"):
        check_targets(library, ["9.9"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backend": "onnxruntime", "weight_stripped": True}, "--strip-weights is about plans"),
        ({"backend": "onnxruntime", "weight_streaming": True}, "--weight-streaming is about plans"),
        (
            {"weight_stripped": True, "weight_streaming": True},
            "--strip-weights and --weight-streaming exclude each other",
        ),
        ({"weight_stripped": True, "weights": "int8"}, "--strip-weights and --weights int8 exclude each other"),
        ({"backend": "onnxruntime", "targets": ("8.9",)}, "--compute-capability is about plans"),
        ({"backend": "onnxruntime", "shapes": "512"}, "--shapes is about plans"),
        ({"backend": "onnxruntime", "batch": 2}, "--batch is about plans"),
        ({"precision": "bf16"}, "no backend runs networks in bf16"),
        ({"batch": 0}, "impossible batch"),
        ({"shapes": "500"}, "multiples of 64"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        make_plan(_request(tmp_path / "b", **changes))
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_build_says_what_would_be_compiled(run_build, tmp_path):
    done = run_build("--backend", "tensorrt-rtx", "--dry-run", "--json", "--output", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    write = json.loads(done.stdout)["write"]
    assert write["targets"] == ["8.6", "8.9", "12.0"]
    graphs = {graph["name"]: graph for graph in write["graphs"]}
    assert graphs["unet"]["precision"] == "fp16"
    assert graphs["unet"]["profiles"][0] == "B = 1 … 2, h = 32, w = 32, k = 1"
    assert list(tmp_path.iterdir()) == []


# -- the library ----------------------------------------------------------------------------------


def test_a_missing_library_is_one_message_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match="needs tensorrt, which is not installed") as caught:
        open_library("tensorrt")
    assert "NVIDIA's package index" in str(caught.value)
    assert "--backend onnxruntime" in str(caught.value)


def test_a_stub_without_a_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.0"))
    with pytest.raises(BackendError, match="tensorrt is a stub without a library"):
        open_library("tensorrt")


def test_plans_do_not_run_on_a_cpu(planned):
    with pytest.raises(UsageError, match="--backend tensorrt-rtx runs on GPUs"):
        Restorer.open(planned.path, device="cpu")
    with pytest.raises(UsageError, match="no such device"):
        Restorer.open(planned.path, device="tpu")


def test_a_library_records_itself_in_its_plans():
    assert TrtLibrary("tensorrt-rtx", None, "1.7").label == "tensorrt-rtx 1.7"
    assert dataclasses.replace(TrtLibrary("tensorrt", None, "10"), backend="tensorrt").is_rtx is False
