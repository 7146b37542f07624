"""SDXL's size by arithmetic, shapes without weights: what is done within which budget, said and used."""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_stand_in import driver
from gpu_stand_in.build import ROOT
from gpu_stand_in.work import DeviceMemory
from layouts import SDXL_WEIGHTS

from engine.backends.buffers import BufferRunner, SelfAllocatingBackend
from engine.backends.runners import Runners
from engine.backends.trt import Arena
from engine.bundle.graphspec import resolve
from engine.bundle.manifest import Bundle
from engine.device.cuda import CudaDevice
from engine.errors import DoesNotFitError
from engine.memory.residency import Activations, Workload
from engine.memory.size_plan import device_plans
from engine.pipeline.device_loop import LoopBuffers
from engine.pipeline.device_session import DeviceSession
from engine.recipe import PHASES, STEP_GRAPHS, stream_of
from engine.settings import Settings

GB, MIB = 10**9, 1 << 20
BUDGETS_GB = (4, 6, 8, 12, 24)
SIZES = ((1024, 1024), (1536, 1024), (2048, 2048))


@pytest.fixture(scope="module")
def sdxl():
    """What a bundle of real checkpoints says of its shapes, and how many bytes its weights have."""
    from layouts import our_shapes

    from export.checkpoint.architecture import infer_architecture
    from export.graphs.definitions import graph_definitions

    shapes = our_shapes(Path(ROOT) / "tests" / "data" / "full_manifest.json")
    graphs = {
        name: SimpleNamespace(spec=definition.spec, segments=(), weights_bytes=SDXL_WEIGHTS[name])
        for name, definition in graph_definitions(infer_architecture(shapes), "fp16", 49407).items()
    }
    return Bundle(Path("sdxl"), SimpleNamespace(graphs=graphs, defaults=Settings()), "0")


class Weights(BufferRunner):
    """A graph that is its weights alone."""

    def __init__(self, spec, device, stream, nbytes):
        super().__init__(spec, device, stream)
        self._memory = DeviceMemory()
        assert self._memory.resize(nbytes) == 0

    def enqueue_impl(self, stream, symbols, inputs, outputs):
        raise AssertionError("it has no values")

    def close(self):
        self._memory.close()


class Shapes(SelfAllocatingBackend):
    """A backend that takes memory as TensorRT does, and runs nothing.

    Activations are maps alone, for attention's matrices are not kept where it is fused: of a step as many as UNet and
    ControlNet hand on, two dozen, in fp16; of the VAE three of its widest, in fp32. Real plans tell their own.
    """

    def __init__(self):
        super().__init__(CudaDevice(0))
        self._arenas = {name: Arena(self.device, stream) for name, stream in self.streams.items()}
        self._limits = {}

    def open(self, bundle, graph):
        nbytes = self._limits.get(graph, SDXL_WEIGHTS[graph])
        return Weights(bundle.spec(graph), self.device, self.streams[stream_of(graph)], nbytes)

    def known_activations(self, bundle, graph, sizes):
        def at(size):
            if "h" not in size:
                return 16 * MIB
            cells = size["B"] * size["h"] * size["w"]
            return cells * (320 * 2 * 24 if graph in STEP_GRAPHS else 64 * 256 * 4 * 3)

        return Activations(max(map(at, sizes)), streaming_bytes=64 * MIB)

    def can_stream_weights(self, bundle, graph):
        return True

    def limit_weights(self, on_device):
        self._limits = dict(on_device)

    def reserve(self, stream, nbytes, *, keep_larger=False):
        self._arenas[stream].resize(nbytes)

    def close(self):
        for arena in self._arenas.values():
            arena.close()
        super().close()


def workload(bundle, size, plan):
    latent = (size[1] // 8, size[0] // 8)
    tiles = [
        None if each.is_whole else each for each in (plan.latent_tiles(bundle, *latent), plan.vae_mode(bundle, *latent))
    ]
    return Workload(1, *latent, texts=2, chunks=1, passes=(1, 2), latent_tiles=tiles[0], vae_tiles=tiles[1])


def arrange(bundle, size, budget):
    """Return the plan that fits, what was said and what was used, and what is done; None where nothing fits."""
    gc.collect()
    backend = Shapes()
    runners = Runners(backend, bundle)
    session = DeviceSession(backend, runners, bundle, budget)
    before = driver.alive()["device bytes"]
    try:
        for plan in device_plans(bundle, size, bundle.manifest.defaults):
            work = workload(bundle, size, plan)
            try:
                told = session.plan(work)
                break
            except DoesNotFitError:
                continue
        else:
            return None
        driver.peak_bytes()
        session.make_room(work, told.residency)
        for phase in PHASES:
            session.enter(phase)
            session.reserve()
            session.buffer("lq")
            for graph in phase:
                session.runner(graph)
            if set(phase) == set(STEP_GRAPHS):
                spec = bundle.spec("unet")
                context = resolve(spec.tensor("context").shape, {"B": work.rows, "k": work.chunks})
                key = ((1, 4, work.height, work.width), context, work.latent_tiles)
                networks = map(session.runner, STEP_GRAPHS)
                session.open_loop()._work = LoopBuffers(backend.device, backend.streams["main"], *networks, key)
        return plan, told, driver.peak_bytes() - before
    finally:
        for close in (session.close, runners.close, backend.close):
            close()


def done(plan, told):
    residency = told.residency
    sampled = "whole" if plan.tile_px is None else f"tiles of {plan.tile_px}"
    decoded = "whole" if plan.vae_tile_px is None else f"tiles of {plan.vae_tile_px}"
    where = "all stay"
    if residency.loaded_by_stage:
        where = f"{len(residency.loaded_by_stage)} networks by stage"
    if residency.streamed:
        where += f", weights of {', '.join(sorted(residency.streamed))} streamed"
    return f"sampled {sampled}, decoded {decoded}; {where}"


def test_what_is_said_is_used_at_sdxls_size_within_each_budget(sdxl, nothing_left, record_property):
    lines = ["| size | budget | said | used | what is done |", "|---|---|---|---|---|"]
    rows = {}
    for size in SIZES:
        for budget in BUDGETS_GB:
            found = rows[size, budget] = arrange(sdxl, size, budget * GB)
            head = f"| {size[0]} × {size[1]} | {budget} GB"
            if found is None:
                lines.append(f"{head} | | | refused before anything is loaded |")
                continue
            plan, told, used = found
            said = told.residency.peak_bytes
            lines.append(f"{head} | {said / GB:.2f} GB | {used / GB:.2f} GB | {done(plan, told)} |")
            assert used <= said + MIB  # each piece is rounded
            assert said <= budget * GB
            assert used >= said - 2 * MIB
    print("", *lines, sep="\n")
    record_property("table", lines)
    assert rows[(1024, 1024), 24][1].residency.loaded_by_stage == ()
    assert all(rows[(1024, 1024), budget] is not None for budget in BUDGETS_GB)
