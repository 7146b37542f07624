"""The VAE's segments: slices cover a map, memory is what was said, files are equal where bundles are."""

import math
import tracemalloc
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="needs the export extra")

from layouts import our_shapes

from engine.backends.ort import OrtBackend
from engine.backends.runners import Runners
from engine.bundle.files import read_archived
from engine.bundle.graphspec import resolve
from engine.bundle.manifest import open_bundle
from engine.errors import BackendError, BuildError, BundleError
from engine.memory.vae_slices import _BESIDE_BYTES, SlicedVae, _shapes, _Slices, peak_bytes, run_slices
from engine.recipe import RECIPE
from export.checkpoint.architecture import infer_architecture
from export.graphs.definitions import graph_definitions
from export.graphs.traces import SHIPPED, read_trace, trace_file
from export.graphs.vae_segments import cut

FULL = Path(__file__).parents[1] / "data" / "full_manifest.json"

VAE_GRAPHS = sorted({graph for operation in RECIPE if operation.kind == "vae" for graph in operation.graphs})


@pytest.fixture(scope="module")
def sdxl():
    """SDXL's VAE in segments, by its graphs' names."""
    return {graph: tuple(entry.segment for entry in cut_sdxl(graph, "fp32")) for graph in VAE_GRAPHS}


def cut_sdxl(graph, precision):
    return cut(sdxl_definition(graph, precision).spec, traced_sdxl(graph, precision).structure)


def traced_sdxl(graph, precision):
    return read_trace(trace_file(SHIPPED / "sdxl", sdxl_definition(graph, precision)))


def sdxl_definition(graph, precision):
    return graph_definitions(infer_architecture(our_shapes(FULL)), precision, 49407)[graph]


def shape_of(graph, height, width):
    return (1, 4, height // 8, width // 8) if graph == "vae_decoder" else (1, 3, height, width)


def test_the_segments_are_a_chain_that_begins_and_ends_as_the_graph(sdxl):
    for graph, segments in sdxl.items():
        known = {"z" if graph == "vae_decoder" else "pixels"}
        for segment in segments:
            maps = set(segment.maps)
            assert maps <= known
            assert (segment.norm is not None) == (len(segment.spec.inputs) == len(maps) + 2)
            assert segment.norm is None or segment.norm.map in maps
            known |= {tensor.name for tensor in segment.spec.outputs}
        assert segments[-1].spec.outputs[0].name == ("pixels" if graph == "vae_decoder" else "z")
        shapes = _shapes(segments, shape_of(graph, 128, 192))
        assert shapes["pixels"] == (1, 3, 128, 192)
        assert shapes["z"] == (1, 4, 16, 24)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**22), st.sampled_from(VAE_GRAPHS))
def test_slices_cover_every_row_once_and_see_what_they_need(sdxl, height, width, slice_bytes, graph):
    segments = sdxl[graph]
    shapes = _shapes(segments, shape_of(graph, 8 * height, 8 * width))
    for segment in segments:
        slices = _Slices(segment, shapes, SlicedVae(slice_bytes))
        result = shapes[segment.spec.outputs[0].name]
        source = shapes[segment.spec.inputs[0].name]
        rows, source_rows = (math.prod(shape[2:]) if segment.whole else shape[2] for shape in (result, source))
        seen = list(slices)
        assert len(seen) == len(slices)
        assert [row for slice_ in seen for row in range(slice_.start, slice_.start + slice_.count)] == list(range(rows))
        ratio = source_rows / rows
        for slice_ in seen:
            assert 0 <= slice_.first < slice_.stop <= source_rows
            assert slice_.first <= max(0, slice_.start * ratio - segment.halo[0])
            assert slice_.stop >= min(source_rows, (slice_.start + slice_.count) * ratio + segment.halo[1])
            assert slice_.skip == slice_.start - slice_.first / ratio
            assert slice_.skip + slice_.count <= (slice_.stop - slice_.first) / ratio


@pytest.mark.parametrize("graph", VAE_GRAPHS)
def test_memory_is_what_was_said(sdxl, graph):
    """With segments that give zeros: what is left are the maps."""
    segments = sdxl[graph]
    shape = shape_of(graph, 256, 320)

    class Zeros:
        def __init__(self, segment):
            self.spec = segment.spec

        def infer(self, inputs):
            known = {tensor.name: inputs[tensor.name].shape for tensor in self.spec.inputs}
            output = self.spec.outputs[0]
            return {output.name: np.zeros(resolve(output.shape, self.spec.sizes_of(known)), np.float32)}

    @contextmanager
    def open_segment(segment):
        yield Zeros(segment)

    image = np.zeros(shape, np.float32)
    tracemalloc.start()
    try:
        run_slices(segments, image, open_segment, SlicedVae(1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = peak_bytes(segments, shape) - _BESIDE_BYTES
    assert 0.95 * said < peak < said + (12 << 20)


def test_what_sdxl_needs_for_twelve_megapixels_by_hand(sdxl):
    """The decoder's last level: a block's input of 256 channels, its middle of 128, and in its place the result."""
    needed = peak_bytes(sdxl["vae_decoder"], shape_of("vae_decoder", 3008, 4032)) - _BESIDE_BYTES
    assert needed == (256 + 128) * 4 * 3008 * 4032


def test_the_input_is_not_changed_and_a_segment_is_closed_behind_its_slices(bundle_fp32):
    bundle = open_bundle(bundle_fp32)
    graph = bundle.manifest.graphs["vae_decoder"]
    backend, opened = OrtBackend(), []

    @contextmanager
    def open_segment(segment):
        assert not opened
        opened.append(segment)
        with backend.open_segment(segment, bundle.read_segment("vae_decoder", segment), bundle.path) as runner:
            yield runner
        opened.pop()

    z = np.random.default_rng(0).normal(size=(1, bundle.latent_channels, 8, 8)).astype(np.float32)
    before = z.copy()
    run_slices(graph.segments, z, open_segment, SlicedVae(1))
    assert np.array_equal(z, before)


def test_only_the_vae_has_segments_whatever_its_precision():
    assert cut_sdxl("unet", "fp16") == ()
    for graph in VAE_GRAPHS:
        assert len(cut_sdxl(graph, "bf16")) == len(cut_sdxl(graph, "fp32"))


def test_every_parameter_is_in_a_segment(sdxl):
    """In one; but attention's three projections all begin with its norm."""
    for graph in VAE_GRAPHS:
        structure = traced_sdxl(graph, "fp32").structure
        read = Counter(
            value.name
            for entry in cut(sdxl_definition(graph, "fp32").spec, structure)
            for value in entry.structure.graph.input[len(entry.segment.spec.inputs) :]
        )
        assert set(read) == {value.name for value in structure.graph.input[1:]}
        for name, times in read.items():
            assert times == (3 if "attentions.0.group_norm" in name else 1)


def test_cutting_leaves_the_trace_as_it_is():
    structure = traced_sdxl("vae_decoder", "fp32").structure
    before = structure.SerializeToString(deterministic=True)
    cut(sdxl_definition("vae_decoder", "fp32").spec, structure)
    assert structure.SerializeToString(deterministic=True) == before


def test_attention_that_is_traced_in_another_way_is_an_error():
    structure = traced_sdxl("vae_decoder", "fp32").structure
    next(node for node in structure.graph.node if node.op_type == "Softmax").input[0] = "z"
    with pytest.raises(BuildError, match=r"the graph cannot be cut into segments") as caught:
        cut(sdxl_definition("vae_decoder", "fp32").spec, structure)
    assert "vae_decoder: 'z'" in str(caught.value)


def test_the_segments_of_equal_bundles_are_equal_files(build_bundle, bundle_fp32, tmp_path):
    other = build_bundle(tmp_path / "again")
    for graph in VAE_GRAPHS:
        name = f"{graph}.segments.zip"
        assert (other / name).read_bytes() == (bundle_fp32 / name).read_bytes()


def test_a_file_of_segments_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "vae_decoder.segments.zip"
    for content in (None, b"no zip", b"PK\x05\x06" + bytes(18)):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(BundleError, match="cannot be read") as caught:
            read_archived(file, "a.onnx")
        assert str(file) in str(caught.value)


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path):
    file = tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.onnx", "w") as entry:
        for _ in range(100):
            entry.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(BundleError, match="too large"):
        read_archived(file, "a.onnx")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 << 20


def test_a_backend_that_runs_whole_graphs_only_says_so(bundle_fp32):
    with pytest.raises(BackendError, match="the VAE cannot run in slices here") as caught:
        Runners(object(), open_bundle(bundle_fp32)).open_segment("vae_decoder")
    assert "--vae-tiles auto" in str(caught.value)
