"""Tracing, packing and verifying, on the small text graphs."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

import numpy as np
import onnx
from onnx import TensorProto
from safetensors import safe_open

from engine.bundle.manifest import open_bundle
from engine.bundle.verification import relative_l2
from engine.errors import BuildError, CheckpointError, OutputError, UsageError
from engine.settings import Settings
from export.build import verify
from export.build.build_plan import make_plan
from export.build.presets import PRESETS, fitting
from export.build.request import BuildRequest, LoraRequest
from export.build.trial import TRIAL_SYMBOLS, try_graph, widen
from export.build.verify import compare_with_torch
from export.build.weights import Weight, plan_layout, write_weights
from export.checkpoint.tensor_files import LazyTensor
from export.checkpoint.tokenizer import END_TOKEN, START_TOKEN, check_vocabulary, clip_tokenizer, load_tokenizer
from export.graphs import to_onnx, traces
from export.graphs.builder import as_tensor, call_arguments, graph_builders
from export.graphs.definitions import example_inputs
from export.graphs.pack import pack

END = 49407


@pytest.fixture(scope="module")
def plan(tiny, tmp_path_factory):
    return make_plan(
        BuildRequest(tiny.sdxl, tiny.supir, tiny.tokenizer, tmp_path_factory.mktemp("out") / "b", preset="lightning")
    )


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def packed(request, plan, tmp_path_factory):
    """The graph `text_encoder_2` with its weights, in each precision."""
    builder = graph_builders(plan.arch, request.param, END)["text_encoder_2"]
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[request.param]
    layout = plan_layout([Weight(name, dtype, shape) for name, shape in builder.parameters.items()])
    folder = tmp_path_factory.mktemp(request.param)
    write_weights(folder / "weights.safetensors", layout, plan.tensors, [])
    structure = traces.shipped_trace(builder.definition).structure
    onnx.save(pack(structure, builder.spec, layout.weights), folder / "text_encoder_2.onnx")
    return builder, folder / "text_encoder_2.onnx", structure, layout


def verified(builder, file):
    return compare_with_torch(builder, file, try_graph(builder.definition, file))


def with_epsilon(packed, eps, folder):
    """Write the packed graph with another ε in its norms; returns its file."""
    builder, file, structure, layout = packed
    broken = onnx.ModelProto()
    broken.CopyFrom(pack(structure, builder.spec, layout.weights))
    for node in broken.graph.node:
        if node.op_type == "LayerNormalization":
            next(a for a in node.attribute if a.name == "epsilon").f = eps
    onnx.save(broken, folder / "text_encoder_2.onnx")
    shutil.copy(file.parent / "weights.safetensors", folder)  # a link out of the folder is not followed
    return folder / "text_encoder_2.onnx"


def test_every_precision_agrees_with_torch(packed):
    builder, file, _, _ = packed
    agreement, expected = compare_with_torch(builder, file, try_graph(builder.definition, file))
    assert set(agreement.relative_l2) == set(expected) == {"hidden", "pooled"}
    assert agreement.worst < {"fp32": 2e-6, "fp16": 2e-3, "bf16": 2e-4}[builder.spec.precision]


def test_a_module_whose_weights_are_read_as_they_are_used_gives_the_same_bits(packed):
    builder, file, _, layout = packed
    weights = file.with_name("weights.safetensors")
    inputs = builder.example(TRIAL_SYMBOLS, 4)
    with torch.inference_mode():
        expected = verify.load_module(builder, weights)(*call_arguments(builder.spec, inputs))
    module = builder.module().float()
    with torch.inference_mode(), safe_open(weights, "pt") as opened:
        source = Counted(opened)
        with verify.Streamed(module, source):
            found = module(*call_arguments(builder.spec, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert source.read == set(layout.weights)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


class Counted:
    """A weights file that knows what was read of it."""

    def __init__(self, file):
        self.file, self.read = file, set()

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        self.read.add(name)
        return self.file.get_tensor(name)


def test_parameters_keep_their_names_and_shapes(packed):
    builder, _, structure, _ = packed
    inputs = {
        value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in structure.graph.input[len(builder.spec.inputs) :]
    }
    assert inputs == builder.parameters


def test_inputs_and_outputs_are_the_specs(packed):
    builder, file, _, _ = packed
    model = onnx.load(file, load_external_data=False)
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    for values, tensors in ((model.graph.input, builder.spec.inputs), (model.graph.output, builder.spec.outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            assert value.type.tensor_type.elem_type == {**types, "int64": TensorProto.INT64}[tensor.dtype]
            axes = [axis.dim_value or axis.dim_param for axis in value.type.tensor_type.shape.dim]
            assert axes == list(tensor.shape)
    onnx.checker.check_model(str(file))


def typed_outputs(model):
    """The element type of every value of a typed graph."""
    inferred = onnx.shape_inference.infer_shapes(model)
    return {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}


def test_norms_and_softmax_run_in_float32_and_products_in_the_graphs_type(packed):
    builder, file, _, _ = packed
    model = onnx.load(file, load_external_data=False)
    types = typed_outputs(model)
    products = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
    seen = set()
    for node in model.graph.node:
        kind = types.get(node.output[0])
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert kind == TensorProto.FLOAT
            seen.add(node.op_type)
        elif node.op_type == "MatMul":
            assert kind == products[builder.spec.precision]
            seen.add(node.op_type)
    assert seen == {"LayerNormalization", "Softmax", "MatMul"}


def test_a_wrong_graph_fails_and_is_named(packed, tmp_path):
    with pytest.raises(
        BuildError, match=r"(?s)text_encoder_2\.(hidden|pooled): the exported graph disagrees.*relative L2"
    ):
        verified(packed[0], with_epsilon(packed, 0.3, tmp_path))


def test_a_parameter_without_its_weight_is_named(packed):
    builder, _, structure, layout = packed
    name = "text_encoder_2.final_layer_norm.weight"
    for weights in (
        {key: value for key, value in layout.weights.items() if key != name},
        {**layout.weights, name: Weight(name, "float32", (3,))},
    ):
        with pytest.raises(BuildError, match=rf"text_encoder_2: {name}: a parameter of the graph is not"):
            pack(structure, builder.spec, weights)


def test_traces_are_cached_by_everything_they_depend_on(plan, monkeypatch, tmp_path):
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path))
    builder = graph_builders(plan.arch, "fp32", END)["text_encoder"]
    assert to_onnx.find_cached(builder.definition) is None
    first = to_onnx.trace(builder)
    assert to_onnx.find_cached(builder.definition).structure == first.structure
    monkeypatch.setattr(to_onnx, "_trace", lambda builder: pytest.fail("traced again"))
    assert to_onnx.trace(builder).provenance == first.provenance
    others = [
        graph_builders(plan.arch, "fp16", END)["text_encoder"],
        graph_builders(plan.arch, "fp32", END)["text_encoder_2"],
        graph_builders(plan.arch, "fp32", 7)["text_encoder_2"],
    ]
    keys = {to_onnx.local_key(other.definition) for other in (builder, *others)}
    assert len(keys) == 4


def test_a_damaged_trace_of_the_cache_is_made_anew(plan, monkeypatch, tmp_path):
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path))
    builder = graph_builders(plan.arch, "fp32", END)["text_encoder"]
    made = onnx.load_from_string(traces.shipped_trace(builder.definition).structure.SerializeToString())
    monkeypatch.setattr(to_onnx, "_trace", lambda builder: made)
    to_onnx.trace(builder)
    file = next(tmp_path.glob("traces/*"))
    for damage in (b"\xff\xff", b""):
        file.write_bytes(damage)
        assert to_onnx.trace(builder).structure == made
        assert file.stat().st_size > 1000
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_told(plan, monkeypatch, tmp_path):
    (tmp_path / "traces").touch()
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path))
    monkeypatch.setattr(to_onnx, "_trace", lambda builder: onnx.ModelProto())
    with pytest.raises(OutputError, match="cannot keep the trace"):
        to_onnx.trace(graph_builders(plan.arch, "fp32", END)["text_encoder"])


def test_examples_fit_their_specs(plan):
    for graph in plan.graphs.values():
        spec = graph.definition.spec
        inputs = example_inputs(graph.definition, TRIAL_SYMBOLS, 3)
        spec.bind({name: (value.dtype.name, value.shape) for name, value in inputs.items()})
        assert len(call_arguments(spec, inputs)) == (6 if spec.name == "unet" else len(inputs))
        tensors = {tensor.name: as_tensor(inputs[tensor.name], tensor.dtype) for tensor in spec.inputs}
        assert all(np.array_equal(tensors[name].float().numpy(), inputs[name]) for name in inputs)


def test_widening_leaves_no_bfloat16(tmp_path):
    half = onnx.helper.make_tensor("w", TensorProto.BFLOAT16, [2], [1.5, -2.0])
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["a"], to=TensorProto.BFLOAT16),
        onnx.helper.make_node("Mul", ["a", "w"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [2])], [value("y", TensorProto.BFLOAT16, [2])], [half]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "g.onnx")
    (tmp_path / "wide").mkdir()
    wide = onnx.load(widen(tmp_path / "g.onnx", tmp_path / "wide"))
    assert wide.SerializeToString() != b""
    assert wide.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert wide.graph.node[0].attribute[0].i == TensorProto.FLOAT
    assert onnx.numpy_helper.to_array(wide.graph.initializer[0]).tolist() == [1.5, -2.0]


def test_relative_l2_is_strict_about_nan_and_zero():
    assert relative_l2(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.0
    assert np.isnan(relative_l2(np.zeros(2), np.zeros(2)))
    assert np.isnan(relative_l2(np.array([np.nan, 1.0]), np.ones(2)))


# -- plans ----------------------------------------------------------------------------------------


def request(tiny, tmp_path, **changes):
    return BuildRequest(
        **{
            "sdxl": tiny.sdxl,
            "supir": tiny.supir,
            "tokenizer": tiny.tokenizer,
            "output": tmp_path / "b",
            "preset": "lightning-8",
            **changes,
        }
    )


def test_a_plan_says_what_it_reads_merges_and_writes(tiny, tmp_path):
    loras = tuple(LoraRequest(name, path, 0.5) for name, path in tiny.loras.items())
    plan = make_plan(request(tiny, tmp_path, loras=loras, precision="fp16"))
    described = plan.describe()
    assert [source["role"] for source in described["read"]] == ["sdxl", "supir"]
    assert [source["bytes"] for source in described["read"]] == [tiny.sdxl.stat().st_size, tiny.supir.stat().st_size]
    assert [(lora["name"], lora["scale"], lora["layers"]) for lora in described["merge"]] == [
        ("landscape", 0.5, 136),
        ("face", 0.5, 136),
    ]
    precisions = {graph["name"]: graph["precision"] for graph in described["write"]["graphs"]}
    assert precisions["unet"] == precisions["text_encoder"] == "fp16"
    assert precisions["vae_decoder"] == precisions["denoise_encoder"] == "fp32"  # SDXL's VAE overflows in fp16
    assert described["write"]["parameters"] == 34_686_995
    assert (plan.defaults.steps, plan.defaults.sampler, plan.defaults.cfg_scale) == (8, "dpmpp2m", (2.0, 1.5))


def test_the_unet_of_another_file_replaces_the_bases(tiny, tmp_path):
    import layouts

    unet = layouts.write_diffusers_unet(tiny.sdxl, tmp_path / "unet.safetensors")
    plan = make_plan(request(tiny, tmp_path, unet=unet))
    assert plan.tensors["unet.conv_in.weight"].file == unet
    assert plan.tensors["vae.quant_conv.bias"].file == tiny.sdxl


@pytest.mark.parametrize("drop", ["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.weight"])
def test_a_missing_tensor_is_named_as_the_file_names_it(tiny, tmp_path, drop):
    import layouts

    broken = layouts.edit(tiny.sdxl, tmp_path / "sdxl.safetensors", drop=[drop])
    with pytest.raises(CheckpointError, match=f"(?s){drop}: a tensor is missing.*--sdxl"):
        make_plan(request(tiny, tmp_path, sdxl=broken))


def test_a_misshapen_tensor_is_named(tiny, tmp_path):
    import layouts

    name = "first_stage_model.denoise_encoder.mid.attn_1.q.bias"
    broken = layouts.edit(tiny.supir, tmp_path / "supir.safetensors", add={name: np.zeros(64, np.float32)})
    with pytest.raises(CheckpointError, match=rf"(?s){name}: a tensor has the wrong shape.*\[128\].*\[64\]"):
        make_plan(request(tiny, tmp_path, supir=broken))


def test_a_tensor_of_no_layer_is_named(tiny, tmp_path):
    import layouts

    name = "model.diffusion_model.input_blocks.1.1.norm.weight"
    broken = layouts.edit(tiny.sdxl, tmp_path / "sdxl.safetensors", add={name: np.zeros(32, np.float32)})
    with pytest.raises(CheckpointError, match=f"{name}: a tensor has no place"):
        make_plan(request(tiny, tmp_path, sdxl=broken))


def test_two_loras_of_one_name_are_refused(tiny, tmp_path):
    face = LoraRequest("face", tiny.loras["face"])
    with pytest.raises(UsageError, match="two LoRAs have one name"):
        make_plan(request(tiny, tmp_path, loras=(face, face)))


def test_presets_are_specs_table():
    table = {name: (p.settings["steps"], p.settings["sampler"], p.settings["cfg_scale"]) for name, p in PRESETS.items()}
    assert table == {
        "ours": (15, "edm", (2, 2)),
        "lightning": (15, "edm", (2, 2)),
        "lightning-lora": (15, "edm", (2, 2)),
        "hwxl": (50, "edm", (1, 4)),
        "hwxl-lora": (50, "edm", (1, 4)),
        "supir": (50, "edm", (1, 4)),
        "supir-fidelity": (50, "edm", (1, 4)),
        "supir-paper": (100, "edm", (8.5, 8.5)),
        "lightning-8": (8, "dpmpp2m", (2, 1.5)),
    }
    pulled = {name: p.settings["restore_pull"] for name, p in PRESETS.items() if "restore_pull" in p.settings}
    assert pulled == {"supir-fidelity": 4, "supir-paper": 4}


@pytest.mark.parametrize(
    ("preset", "count", "right"),
    [("ours", 0, False), ("ours", 2, True), ("hwxl", 1, False), ("lightning-8", 0, True)],
)
def test_presets_check_their_loras(preset, count, right):
    if right:
        PRESETS[preset].check_loras(count)
    else:
        with pytest.raises(UsageError, match=f"preset {preset}"):
            PRESETS[preset].check_loras(count)


@pytest.mark.parametrize(
    ("preset", "count", "others"),
    [
        ("ours", 2, ["lightning-lora", "lightning-8"]),
        ("lightning", 0, ["lightning-8"]),
        ("lightning-8", 0, ["lightning"]),
        ("lightning-8", 1, ["ours", "lightning-lora"]),
        ("hwxl", 0, []),
        ("supir", 0, ["supir-fidelity", "supir-paper"]),
    ],
)
def test_presets_of_the_same_base_and_loras_fit(preset, count, others):
    assert [each.name for each in fitting(preset, count)] == others


def test_a_bundle_keeps_the_presets_that_ask_for_something_else(tiny, tmp_path):
    """`ours` and `lightning-lora` are sampled alike; what the bundle has beside its preset holds for all."""
    loras = (LoraRequest("face", tiny.loras["face"]),)
    plan = make_plan(request(tiny, tmp_path, loras=loras, settings={"min_size": 64}))
    assert list(plan.presets) == ["ours"]
    assert plan.presets["ours"] == Settings(**PRESETS["ours"].settings, min_size=64)
    assert make_plan(request(tiny, tmp_path, loras=loras, preset="ours")).presets.keys() == {"lightning-8"}


def test_a_vocabulary_larger_than_the_towers_is_refused(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="(?s)tokens that the text towers lack.*below 1000"):
        check_vocabulary(tiny.tokenizer, load_tokenizer(tiny.tokenizer), (END + 1, 1000))


def vocabulary_of(tmp_path, end, entries, added=()):
    """A tokenizer with an end token of one's own, some entries beside it, and tokens that were added later."""
    tokenizer = clip_tokenizer({START_TOKEN: 0, END_TOKEN: end} | {f"x{entry}": entry for entry in entries}, [])
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path)


def test_a_tokenizer_that_the_engine_would_refuse_is_refused_by_the_build(tiny, tmp_path):
    described = json.loads((tiny.tokenizer / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": " "}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="(?s)not CLIP's kind of tokenizer.*--tokenizer"):
        load_tokenizer(tmp_path)


def test_the_demos_vocabulary_does_not_fit_sdxls_towers(tiny, tmp_path):
    from export.demo import files

    request = BuildRequest(tiny.sdxl, tiny.supir, files.TOKENIZER, tmp_path / "b", preset="lightning")
    with pytest.raises(CheckpointError, match=r"(?s)not that of the text towers.*49408 entries.*839 entries.* 838"):
        make_plan(request)


@pytest.mark.parametrize(
    ("end", "entries", "added", "fits"),
    [
        (9, range(1, 9), (), True),
        (9, [], (), True),  # CLIP's last, whatever is missing before it
        (8, range(1, 8), (), False),  # the table has another row behind it
        (5, [1, 2, 3, 4, 6, 7, 8, 9], (), False),  # all entries, in another order
        (7, range(1, 7), ("<a>", "<b>"), True),  # words that were learned later, as textual inversion does
        (7, range(1, 7), ("<a>",), False),
        (9, range(1, 9), ("<a>",), False),
    ],
)
def test_end_tokens_and_tables(tmp_path, end, entries, added, fits):
    tokenizer = vocabulary_of(tmp_path, end, entries, added)
    if fits:
        check_vocabulary(tmp_path, tokenizer, (10, 10))
    else:
        with pytest.raises(CheckpointError, match="text towers"):
            check_vocabulary(tmp_path, tokenizer, (10, 10))


def test_every_token_must_be_in_the_towers(tiny, tmp_path):
    """The end token may be in, and others behind it not."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    vocabulary = json.loads((tiny.tokenizer / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["one-more</w>"] = END + 1
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    request = BuildRequest(tiny.sdxl, tiny.supir, folder, tmp_path / "b", preset="lightning")
    with pytest.raises(CheckpointError, match="(?s)tokens that the text towers lack.*below 49408.*up to 49408"):
        make_plan(request)


def test_the_second_tower_is_padded_with_the_first_token():
    from export.checkpoint.tokenizer import PAD_ID_2

    assert PAD_ID_2 == 0


@pytest.mark.parametrize("packed", ["fp32"], indirect=True)  # only it is exact enough to show it
@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_a_norm_of_another_epsilon_is_seen(packed, tmp_path, eps):
    """The most likely slip in a network: 1e-5 and 1e-6 taken for each other."""
    builder = packed[0]
    with pytest.raises(BuildError, match="disagrees"):
        verified(builder, with_epsilon(packed, eps, tmp_path))


@pytest.mark.parametrize("packed", ["fp32", "fp16", "bf16"], indirect=True)
def test_a_graph_whose_values_are_not_finite_is_told(packed, tmp_path):
    builder = packed[0]
    with pytest.raises(BuildError, match=r"(?s)text_encoder_2\.(hidden|pooled): .*not finite.*--precision"):
        try_graph(builder.definition, with_epsilon(packed, float("nan"), tmp_path))


@pytest.mark.parametrize("packed", ["fp32"], indirect=True)
@pytest.mark.parametrize("change", ["offset", "dtype", "shape", "name"])
def test_a_parameter_that_is_not_where_the_graph_looks_is_told(packed, tmp_path, change):
    builder, file, structure, layout = packed
    broken = pack(structure, builder.spec, layout.weights)
    parameter = next(each for each in broken.graph.initializer if len(each.dims) == 2 and each.external_data)
    if change == "offset":
        place = next(entry for entry in parameter.external_data if entry.key == "offset")
        place.value = str(int(place.value) + 64)
    elif change == "dtype":
        parameter.data_type = TensorProto.INT32
    elif change == "shape":
        parameter.dims[:] = [parameter.dims[1], parameter.dims[0]] if len(set(parameter.dims)) > 1 else [1, 64]
    else:
        parameter.name += "x"
    onnx.save(broken, tmp_path / "text_encoder_2.onnx")
    shutil.copy(file.parent / "weights.safetensors", tmp_path)
    with pytest.raises(BuildError, match=f"text_encoder_2: {parameter.name}: a parameter of the graph is not in"):
        try_graph(builder.definition, tmp_path / "text_encoder_2.onnx")


def test_segments_that_are_not_the_whole_are_told(plan, bundle_fp32):
    """A norm's ε in a segment, and the order of two segments' weights, would show."""
    graph = plan.graphs["vae_encoder"]
    segments = list(open_bundle(bundle_fp32).manifest.graphs["vae_encoder"].segments)
    file, zipped = bundle_fp32 / "vae_encoder.onnx", bundle_fp32 / "vae_encoder.segments.zip"
    assert try_graph(graph.definition, file, (segments, zipped)).trial.in_slices < 2e-5
    at = next(index for index, segment in enumerate(segments) if segment.norm is not None)
    segments[at] = segments[at].model_copy(update={"norm": segments[at].norm.model_copy(update={"eps": 1e-2})})
    with pytest.raises(BuildError, match="vae_encoder: the graph in slices disagrees with the whole"):
        try_graph(graph.definition, file, (segments, zipped))


def test_lazy_parts_have_the_shapes_that_they_read():
    value = np.arange(24.0).reshape(6, 4, 1, 1)
    lazy = LazyTensor("t", None, (6, 4, 1, 1), lambda: value)
    for part in ("whole", "matrix", "q", "k", "v"):
        assert lazy.part(part).shape == lazy.part(part).read().shape
    flat = LazyTensor("t", None, (6, 4), lambda: value.reshape(6, 4))
    assert flat.part("transposed").shape == flat.part("transposed").read().shape == (4, 6)
    assert np.array_equal(np.concatenate([flat.part(part).read() for part in ("q", "k", "v")]), value.reshape(6, 4))
