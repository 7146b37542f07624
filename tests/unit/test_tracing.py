import multiprocessing
import time

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from engine.errors import BuildError
from export import to_onnx, tracing
from export.architecture import infer_architecture
from export.checkpoint import open_sdxl, open_supir
from export.graphs import graph_builders


@pytest.fixture
def towers(tiny, monkeypatch, tmp_path):
    """Builders of the two graphs that are traced in seconds, with an empty cache, on two cores."""
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path))
    monkeypatch.setattr(tracing.os, "cpu_count", lambda: 2)
    tensors = {**open_sdxl(tiny.sdxl).tensors, **open_supir(tiny.supir).tensors}
    arch = infer_architecture({name: tensor.shape for name, tensor in tensors.items()})
    builders = graph_builders(arch, "fp32", 50)
    return [builders["text_encoder"], builders["text_encoder_2"]]


def until_ended(children):
    deadline = time.monotonic() + 20
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(child.is_alive() for child in children)


def test_graphs_are_traced_in_other_processes(towers, monkeypatch):
    monkeypatch.setattr(to_onnx, "_trace", lambda builder: pytest.fail("traced here"))
    with tracing.traced_ahead(towers) as traced:
        structures = {builder.spec.name: traced(builder) for builder in towers}
    assert all(map(to_onnx.is_cached, towers))
    for builder in towers:
        names = {value.name for value in structures[builder.spec.name].graph.input}
        assert names >= {tensor.name for tensor in builder.spec.inputs}
        assert len(names & set(builder.parameters)) > 10


def test_a_single_graph_is_traced_here(towers, monkeypatch):
    monkeypatch.setattr(tracing, "ProcessPoolExecutor", lambda *_: pytest.fail("a process for one graph"))
    to_onnx.trace(towers[0])
    with tracing.traced_ahead(towers) as traced:
        assert traced is to_onnx.trace


def children_of(build):
    """Run something inside `traced_ahead`; returns what it raised, and the processes that were at work."""
    others = multiprocessing.active_children()
    children = []

    def started():
        children.extend(child for child in multiprocessing.active_children() if child not in others)
        return children

    with pytest.raises(BaseException) as caught:  # noqa: PT011, an interrupt is none of Exception
        build(started)
    assert len(children) == 2
    return caught.value, children


def test_a_process_that_is_killed_is_told(towers):
    def build(started):
        with tracing.traced_ahead(towers) as traced:
            for child in started():
                child.kill()
            traced(towers[0])

    error, _ = children_of(build)
    assert isinstance(error, BuildError)
    assert str(error).startswith("text_encoder: the process that traced the graph was ended")


def test_a_build_that_ends_early_ends_its_processes(towers):
    def build(started):
        with tracing.traced_ahead(towers):
            started()
            raise KeyboardInterrupt

    error, children = children_of(build)
    assert isinstance(error, KeyboardInterrupt)
    assert until_ended(children)
    assert not any(map(to_onnx.is_cached, towers))
