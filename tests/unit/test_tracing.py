import signal
import subprocess
import time

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
onnx = pytest.importorskip("onnx", reason="needs the export extra")

from engine.errors import BuildError, OutputError
from export.checkpoint.architecture import infer_architecture
from export.checkpoint.checkpoint import open_sdxl, open_supir
from export.graphs import to_onnx, tracing
from export.graphs.builder import graph_builders


@pytest.fixture
def towers(tiny, monkeypatch, tmp_path):
    """Builders of the two graphs that are traced in seconds, with an empty cache, on two cores."""
    monkeypatch.setenv("RESTORE_CACHE", str(tmp_path))
    monkeypatch.setattr(tracing.os, "cpu_count", lambda: 2)
    tensors = {**open_sdxl(tiny.sdxl).tensors, **open_supir(tiny.supir).tensors}
    arch = infer_architecture({name: tensor.shape for name, tensor in tensors.items()})
    builders = graph_builders(arch, "fp32", 50)
    return [builders["text_encoder"], builders["text_encoder_2"]]


@pytest.fixture
def started(monkeypatch):
    """The processes that are started, in order."""
    found = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            found.append(self)

    monkeypatch.setattr(tracing.subprocess, "Popen", Recorded)
    return found


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_graphs_are_traced_in_other_processes(towers, started, monkeypatch):
    monkeypatch.setattr(to_onnx, "_trace", lambda builder: pytest.fail("traced here"))
    with tracing.traced_ahead(towers) as traced:
        structures = {builder.spec.name: traced(builder) for builder in towers}
    assert [process.returncode for process in started] == [0, 0]
    assert all(to_onnx.find_cached(builder.definition) for builder in towers)
    for builder in towers:
        names = {value.name for value in structures[builder.spec.name].structure.graph.input}
        assert names >= {tensor.name for tensor in builder.spec.inputs}
        assert len(names & set(builder.parameters)) > 10


def test_a_single_graph_is_traced_here(towers, started):
    to_onnx.trace(towers[0])
    with tracing.traced_ahead(towers) as traced:
        assert traced is to_onnx.trace
    assert not started


def test_a_process_that_is_killed_is_told(towers, started):
    with tracing.traced_ahead(towers) as traced:
        wait_for(lambda: len(started) == 2)
        for process in started:
            process.kill()
        with pytest.raises(BuildError, match="text_encoder: the process that traced the graph was ended"):
            traced(towers[0])


def test_a_trace_that_fails_elsewhere_fails_here_with_its_own_error(towers, monkeypatch, tmp_path):
    (tmp_path / "traces").touch()
    monkeypatch.setattr(tracing._Tracer, "trace", lambda self, builder: 1)
    with tracing.traced_ahead(towers) as traced:
        monkeypatch.setattr(to_onnx, "_trace", lambda builder: onnx.ModelProto())
        with pytest.raises(OutputError, match="cannot keep the trace"):
            traced(towers[0])


def test_a_build_that_ends_early_ends_its_processes(towers, started):
    def build():
        with tracing.traced_ahead(towers):
            wait_for(lambda: len(started) == 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2
    assert not any(to_onnx.find_cached(builder.definition) for builder in towers)
