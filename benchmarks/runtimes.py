"""The runtimes: each a process of its own, taking turns restoration by restoration.

So a runtime's libraries, peak memory and cold start are its own, and what else the machine does falls
on all of them alike.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.backends.ov_library import Compute
from engine.bundle.graphspec import Precision
from engine.errors import BackendError, RestoreError

ENGINE = "engine"
#: The engine itself with other backends, by the type that they compute in.
ENGINES: dict[str, tuple[str, Compute]] = {
    "onnxruntime": ("onnxruntime", "auto"),
    "openvino-fp32": ("openvino", "fp32"),
    "openvino-bf16": ("openvino", "bf16"),
}
#: PyTorch: whether it is compiled, and whether it computes in bf16.
_TORCH = {
    "torch": (False, False),
    "torch-compile": (True, False),
    "torch-bf16": (False, True),
    "torch-bf16-compile": (True, True),
}
BASELINES = (*_TORCH, *ENGINES)
_END_SECONDS = 5


@dataclass(frozen=True)
class RunSetup:
    """What all runtimes run, and on what.

    Attributes:
        bundle: its folder.
        backend: the engine's.
        gpu: its number, None for the CPU.
        threads: of the CPU that one operator may use; 0 is one per core.
        vram_budget_gib: of the engine; None is all that is free.
        compute: the type that the engine computes in, with OpenVINO.
    """

    bundle: Path
    backend: str
    gpu: int | None
    threads: int = 0
    vram_budget_gib: float | None = None
    compute: Compute = "auto"


@dataclass(frozen=True)
class Configuration:
    """What is restored, and how.

    Attributes:
        size_px: the side of the square photos, which is their working size.
        batch: photos that are restored together.
        steps: of the sampler.
        cfg: whether steps are guided, as the bundle's own settings guide them.
    """

    size_px: int
    batch: int
    steps: int
    cfg: bool

    def __str__(self) -> str:
        guidance = "on" if self.cfg else "off"
        return f"{self.size_px} × {self.size_px} px, batch {self.batch}, {self.steps} steps, cfg {guidance}"

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from the bundle's settings."""
        unguided = {} if self.cfg else {"cfg_scale": 1.0}
        return {"min_size": self.size_px, "steps": self.steps, **unguided}


@dataclass(frozen=True)
class RepeatCounts:
    """How many restorations: first `warmup` that are not counted, then `repeats` that are."""

    warmup: int
    repeats: int


def measure(
    runtimes: Sequence[str], setup: RunSetup, configuration: Configuration, counts: RepeatCounts, *, quiet: bool
) -> dict[str, dict[str, Any]]:
    """Return what each runtime's process tells of one configuration, as plain data.

    Returns:
        By runtime: "runs", the counted restorations, each with "graphs_ms", "outside_ms", "device_ms",
        "total_ms"; "launches", of one restoration; "computed_in", the precision that each graph is computed in,
        None on a GPU, where it is the graph's; "cold_start_ms", its parts, and "warm_start_ms";
        "peak_memory_bytes", "gpu_peak_bytes" and "gpu", None where there is none.
    Raises:
        BackendError: a runtime cannot run it, or its process ends.
    """
    context = multiprocessing.get_context("spawn")  # no library of one runtime in another
    workers: dict[str, tuple[Any, Connection]] = {}
    found: dict[str, dict[str, Any]] = {}
    try:
        for name in runtimes:
            here, there = context.Pipe()
            started = time.perf_counter()
            process = context.Process(target=_work, args=(there, name, setup, configuration), daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            workers[name] = process, here
            ready = _answer(name, process, here)  # one imports its libraries while the others wait
            found[name] = {**ready, "start_ms": (time.perf_counter() - started) * 1e3, "first": [], "runs": []}
        rounds = counts.warmup + counts.repeats
        for number in tqdm(range(rounds), desc=str(configuration), unit="round", file=sys.stderr, disable=quiet):
            for name, (process, connection) in workers.items():
                connection.send({"watched": number == 0, "again": False})
                found[name]["first" if number < counts.warmup else "runs"].append(_answer(name, process, connection))
        for name, (process, connection) in workers.items():
            connection.send({"watched": False, "again": True})
            found[name]["warm"] = _answer(name, process, connection)
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join(timeout=_END_SECONDS)
            process.kill()
    return {name: _starts_and_peaks(runtime) for name, runtime in found.items()}


def _starts_and_peaks(found: dict[str, Any]) -> dict[str, Any]:
    restorations = [*found["first"], *found["runs"]]
    first = restorations[0]
    gpu_peaks = [run["gpu_peak_bytes"] for run in restorations if run["gpu_peak_bytes"] is not None]
    return {
        "gpu": found["gpu"],
        "computed_in": found["computed_in"],
        "launches": first["launches"],
        "cold_start_ms": found["start_ms"] + first["total_ms"],
        "cold_start_parts_ms": {
            "interpreter": found["start_ms"] - found["import_ms"] - found["open_ms"],
            "import": found["import_ms"],
            "open": found["open_ms"],
            "first restoration": first["total_ms"],
        },
        "warm_start_ms": found["warm"]["open_ms"] + found["warm"]["total_ms"],
        "peak_memory_bytes": max(run["peak_memory_bytes"] or 0 for run in restorations) or None,
        "gpu_peak_bytes": max(gpu_peaks, default=None),
        "runs": [
            {key: run[key] for key in ("graphs_ms", "outside_ms", "device_ms", "total_ms")} for run in found["runs"]
        ],
    }


def _answer(name: str, process: Any, connection: Connection) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = connection.recv()
    except EOFError:
        process.join(timeout=_END_SECONDS)
        raise BackendError(
            "the process ended",
            where=name,
            found=f"exit status {process.exitcode}",
            fix="if that is -9, memory ran out: measure a smaller --size",
        ) from None
    if "error" in answer:
        raise BackendError(**answer["error"]).at(name)
    return answer


def _work(connection: Connection, name: str, setup: RunSetup, configuration: Configuration) -> None:
    """Be the other process: one restoration per message."""
    try:
        runtime = _Runtime(name, setup, configuration)
        open_ms = runtime.open()
        told = {"gpu": runtime.gpu, "computed_in": runtime.computed_in, "import_ms": runtime.import_ms}
        connection.send({**told, "open_ms": open_ms})
        while True:
            task = connection.recv()
            open_ms = runtime.reopen() if task["again"] else 0.0
            connection.send({"open_ms": open_ms, **runtime.restore(watched=task["watched"])})
    except (EOFError, KeyboardInterrupt):
        return
    except RestoreError as error:
        names = ("problem", "where", "expected", "found", "fix")
        connection.send({"error": {name: getattr(error, name) for name in names}})
    except Exception as error:
        connection.send({"error": {"problem": "the process failed", "found": f"{type(error).__name__}: {error}"}})


class _Runtime:
    """What runs in a process: it imports only what its runtime needs."""

    def __init__(self, name: str, setup: RunSetup, configuration: Configuration) -> None:
        started = time.perf_counter()
        import numpy as np

        import engine  # noqa: F401

        if name != ENGINE and name not in ENGINES:
            import benchmarks.torch_backend  # noqa: F401
        self.import_ms = (time.perf_counter() - started) * 1e3
        self._name, self._setup, self._configuration = name, setup, configuration
        shape = (configuration.size_px, configuration.size_px, 3)
        seeds = range(configuration.batch)
        self._photos = [np.random.default_rng(seed).random(shape, dtype=np.float32) for seed in seeds]
        self._launches: list[Any] | None = None
        self.gpu: dict[str, Any] | None = None
        self.computed_in: dict[str, Precision] | None = None

    def open(self) -> float:
        """Open the bundle and return the milliseconds that it took; graphs are opened as they are needed."""
        from benchmarks.memory import DeviceMemory
        from engine.backends.base import ComputingBackend
        from engine.backends.buffers import DeviceBackend
        from engine.bundle.manifest import open_bundle
        from engine.pipeline.restorer import Restorer

        setup = self._setup
        started = time.perf_counter()
        bundle = open_bundle(setup.bundle)
        if self._name == ENGINE or self._name in ENGINES:
            from engine.backends import make_backend

            name, compute = ENGINES.get(self._name, (setup.backend, setup.compute))
            device = "cpu" if setup.gpu is None else f"cuda:{setup.gpu}"
            backend = make_backend(name, device=device, threads=setup.threads, compute=compute)
            in_bf16 = False  # but where it says so itself
        else:
            from benchmarks.torch_backend import make_torch_backend

            compiled, in_bf16 = _TORCH[self._name]
            backend = make_torch_backend(bundle, setup.gpu, compiled=compiled, in_bf16=in_bf16, threads=setup.threads)
        budget = setup.vram_budget_gib if self._name == ENGINE else None
        self._restorer = Restorer(bundle, backend, vram_budget_bytes=None if budget is None else int(budget * 2**30))
        open_ms = (time.perf_counter() - started) * 1e3
        if isinstance(backend, ComputingBackend):
            self.computed_in = {graph: backend.computes_in(bundle, graph) for graph in bundle.manifest.graphs}
        elif setup.gpu is None:
            self.computed_in = dict.fromkeys(bundle.manifest.graphs, "bf16" if in_bf16 else "fp32")
        self._memory = None
        if isinstance(backend, DeviceBackend):
            from benchmarks.machine import describe_device

            self._memory = DeviceMemory(backend.device)
            self.gpu = self.gpu or describe_device(backend.device)
        return open_ms

    def reopen(self) -> float:
        """Close everything and open it again, as `open`."""
        self._restorer.close()
        return self.open()

    def restore(self, *, watched: bool) -> dict[str, Any]:
        """Restore the photos, with texts that are encoded anew."""
        from dataclasses import asdict

        from benchmarks.stages import plan_launches
        from engine.memory.host_memory import peak_memory_bytes

        restorer, configuration = self._restorer, self._configuration
        restorer.stages.clear_prompt_cache()
        with self._memory.turn(watched=watched) if self._memory else nullcontext():
            started = time.perf_counter()
            result = restorer.restore_batch(self._photos, **configuration.settings)[0]
            total_ms = (time.perf_counter() - started) * 1e3
        times = result.timings
        if self._launches is None:
            plan = plan_launches(restorer, result.settings, configuration.size_px, configuration.batch)
            self._launches = [asdict(launch) for launch in plan]
        return {
            "graphs_ms": times.graphs_ms,
            "outside_ms": times.outside_ms,
            "device_ms": times.device_ms,
            "total_ms": total_ms,
            "peak_memory_bytes": peak_memory_bytes(),
            "gpu_peak_bytes": self._memory.peak_bytes if self._memory else None,
            "launches": self._launches,
        }
