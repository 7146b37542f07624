"""Traces that ship with the project, and what is said where one is damaged, stale or missing."""

import lzma
import shutil

import pytest

onnx = pytest.importorskip("onnx", reason="needs the build extra")

from conftest import DATA

from engine.errors import BuildError
from export.build import build_plan as plan
from export.build.request import BuildRequest
from export.build.trial import BOUNDS, trial_symbols
from export.checkpoint.architecture import infer_architecture
from export.graphs import traces
from export.graphs.traces import (
    ARCHITECTURE,
    MAKE_AGAIN,
    SHIPPED,
    StaleTraceError,
    read_architecture,
    read_trace,
    shipped_trace,
    trace_file,
    trace_key,
    write_trace,
)

FOLDERS = [SHIPPED / "sdxl", SHIPPED / "demo", DATA / "traces" / "reference"]
MOST_BYTES = 3_000_000


def definitions(folder):
    return list(read_architecture(folder / ARCHITECTURE).definitions())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_graph_and_precision_ships_as_this_code_makes_it(folder):
    """Where it fails, code that decides a graph has changed: `make traces`."""
    stale = []
    for definition in definitions(folder):
        file = trace_file(folder, definition)
        if not file.is_file() or read_trace(file).provenance.key != trace_key(definition):
            stale.append(file.name)
    assert not stale, f"{MAKE_AGAIN} ({', '.join(stale)})"
    assert {file.name for file in folder.iterdir()} == {
        ARCHITECTURE,
        *(trace_file(folder, definition).name for definition in definitions(folder)),
    }


def test_they_are_small():
    files = [file for folder in FOLDERS for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_says_where_it_comes_from_and_how_well_it_agreed_with_torch(folder):
    for definition in definitions(folder):
        found = shipped_trace(definition).provenance
        assert {"torch", "onnx", "onnxscript", "onnx-ir", "diffusers"} <= set(found.traced_with)
        assert found.agreement.symbols == trial_symbols(definition.spec)
        assert set(found.agreement.relative_l2) == {tensor.name for tensor in definition.spec.outputs}
        assert 0 < found.agreement.worst <= found.agreement.bound == BOUNDS[definition.spec.precision]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_inputs_are_the_specs_then_parameters_of_the_network(folder):
    for definition in definitions(folder):
        trace = shipped_trace(definition)
        names = [value.name for value in trace.structure.graph.input]
        count = len(definition.spec.inputs)
        assert names[:count] == [tensor.name for tensor in definition.spec.inputs]
        shapes = {
            value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
            for value in trace.structure.graph.input[count:]
        }
        assert shapes
        assert shapes.items() <= trace.provenance.parameters.items()
        assert not trace.structure.metadata_props


def test_parameters_are_the_torch_modules_in_its_order():
    pytest.importorskip("torch", reason="needs the export extra")
    from export.graphs.builder import GraphBuilder

    for folder in FOLDERS:
        for definition in definitions(folder):
            found = shipped_trace(definition).provenance.parameters
            assert list(found.items()) == list(GraphBuilder(definition).parameters.items())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("folder", FOLDERS[1:], ids=lambda folder: folder.name)
def test_tracing_again_gives_the_same_nodes_and_parameters(folder, monkeypatch, tmp_path):
    """With the versions of the libraries that made them; others may trace otherwise."""
    pytest.importorskip("torch", reason="needs the export extra")
    from export.graphs.builder import GraphBuilder
    from export.graphs.to_onnx import make_trace

    for definition in definitions(folder):
        shipped, made = shipped_trace(definition), make_trace(GraphBuilder(definition))
        if made.provenance.traced_with != shipped.provenance.traced_with:
            pytest.skip(f"slow: needs the libraries that made the traces, {shipped.provenance.traced_with}")
        assert made.provenance.parameters == shipped.provenance.parameters
        old, new = shipped.structure.graph, made.structure.graph
        assert [node.op_type for node in new.node] == [node.op_type for node in old.node]
        for one, other in zip(new.node, old.node, strict=True):
            assert one == other
        assert list(new.initializer) == list(old.initializer)
        assert (list(new.input), list(new.output)) == (list(old.input), list(old.output))


# -- what is wrong with a trace -------------------------------------------------------------------


@pytest.fixture
def copy(monkeypatch, tmp_path):
    """A copy of the demo's traces in place of those that ship; returns its folder."""
    folder = shutil.copytree(SHIPPED / "demo", tmp_path / "traces" / "demo")
    monkeypatch.setattr(traces, "SHIPPED", tmp_path / "traces")
    monkeypatch.setenv("RESTORE_TRACES", "")
    return folder


@pytest.fixture
def unet(copy):
    """The definition of the demo's UNet in fp32."""
    return read_architecture(copy / ARCHITECTURE).definition("unet", "fp32")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no trace",
        lambda data: data[:-40],
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        lambda data: lzma.compress(b"no graph"),
        lambda data: lzma.compress(onnx.helper.make_model(onnx.GraphProto()).SerializeToString()),
    ],
    ids=["empty", "text", "cut off", "a bit", "no graph", "no provenance"],
)
def test_a_damaged_trace_is_named_with_the_mend(copy, unet, damage):
    file = trace_file(copy, unet)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BuildError, match=r"(?s)unet\.fp32\.onnx\.xz: the trace is damaged.*make traces"):
        shipped_trace(unet)


def test_a_trace_of_another_precision_is_named(copy, unet):
    shutil.copy(copy / "unet.fp16.onnx.xz", trace_file(copy, unet))
    with pytest.raises(BuildError, match=r"(?s)of another graph or precision.*unet, fp32.*unet, fp16"):
        shipped_trace(unet)


def test_a_trace_of_another_version_is_named(copy, unet):
    file = trace_file(copy, unet)
    trace = read_trace(file)
    old = trace.provenance.model_copy(update={"key": "0" * 32})
    write_trace(traces.Trace(trace.structure, old), file)
    with pytest.raises(StaleTraceError, match=r"(?s)made by another version of the code.*install the project again"):
        shipped_trace(unet)


def test_a_damaged_description_is_named(copy, unet):
    (copy / ARCHITECTURE).write_text("{}")
    read_architecture.cache_clear()
    with pytest.raises(BuildError, match=r"(?s)architecture\.json: the description of an architecture is damaged"):
        shipped_trace(unet)
    read_architecture.cache_clear()


def demo_request(tmp_path, **changes):
    from export.demo import files

    fields = {"sdxl": files.SDXL, "supir": files.SUPIR, "tokenizer": files.TOKENIZER, "output": tmp_path / "b"}
    return BuildRequest(**{**fields, "preset": "lightning", **changes})


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setattr(plan, "can_trace", lambda: False)


def test_a_stale_trace_ends_a_build_without_torch_and_is_told_with_it(copy, unet, monkeypatch, tmp_path):
    test_a_trace_of_another_version_is_named(copy, unet)
    monkeypatch.setattr(plan, "can_trace", lambda: False)
    with pytest.raises(StaleTraceError, match="make traces"):
        plan.make_plan(demo_request(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(traces, "SHIPPED", copy.parent)
    pytest.importorskip("torch", reason="needs the export extra")
    said = []
    found = plan.make_plan(demo_request(tmp_path), said.append)
    assert said == ["unet: the trace was made by another version of the code; it is traced anew"]
    assert found.graphs["unet"].origin in ("cached", "needed")
    assert found.graphs["controlnet"].origin == "shipped"


@pytest.mark.parametrize("changes", [{"verify": "torch"}, {"retrace": True}])
def test_what_needs_torch_says_so(without_torch, tmp_path, changes):
    with pytest.raises(BuildError, match=r"(?s)needs PyTorch.*pip install -e '\.\[export\]'"):
        plan.make_plan(demo_request(tmp_path, **changes))


def test_an_architecture_that_no_trace_knows_is_told_by_what_differs(without_torch, copy, tmp_path):
    """One network of the demo is another one: it is named, with what differs from the nearest known architecture."""
    known = read_architecture(copy / ARCHITECTURE)
    other = known.model_copy(update={"end_id": known.end_id - 5})
    (copy / ARCHITECTURE).write_text(other.model_dump_json())
    read_architecture.cache_clear()
    with pytest.raises(BuildError) as caught:
        plan.make_plan(demo_request(tmp_path))
    read_architecture.cache_clear()
    text = str(caught.value)
    assert text.startswith("text_encoder_2, fp32: no trace ships for this architecture")
    assert f"end token {known.end_id - 5}, as in the demo" in text
    assert f"end token {known.end_id}\n" in text
    assert "pip install -e '.[export]'" in text


def test_the_nearest_architecture_is_the_one_that_differs_least():
    from layouts import our_shapes

    shapes = our_shapes(DATA / "full_manifest.json")
    last = "mid_block.attentions.0.transformer_blocks.9"
    shapes = {name: shape for name, shape in shapes.items() if last not in name}
    arch = infer_architecture(shapes)
    definition = traces.graph_definitions(arch, "fp16", 49407)["unet"]
    error = traces.difference_from_known(arch, 49407, definition)
    assert error.expected == "unet.middle_depth 10, controlnet.middle_depth 10, as in SDXL with SUPIR v0"
    assert error.found == "unet.middle_depth 9, controlnet.middle_depth 9"
