"""The work on many photos, by the machines of a Ray cluster; the only module that knows Ray.

Ray Data hands photos to actors that hold a restorer each, one per GPU or, without GPUs, one per machine; what they
write has its name when it is whole. A lost actor's photo is given to another one, which first looks whether it
was written. All machines see photos, results and bundle under the same names.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from engine.backends.trt_library import PLAN_BACKENDS
from engine.cli.batch import Outcome, ProgressListener, restore_all
from engine.cli.jobs import PhotoJob
from engine.cli.workers import Notes, WorkerConfig, replay
from engine.errors import BackendError, UsageError

#: Long enough for a slow network, short enough for a person.
_KNOCK_S = 10.0


def restore_on_cluster(
    jobs: Sequence[PhotoJob], plan: WorkerConfig, uses_gpu: bool, address: str, watch: ProgressListener
) -> Iterator[Outcome]:
    """Restore photos on a Ray cluster, and yield what became of each as it is done.

    Args:
        jobs: what to restore into which files; names are made absolute for the cluster.
        plan: what its actors are made from.
        uses_gpu: whether each of them needs a GPU.
        address: of the cluster, as `ray.init` takes it.
        watch: is told how it goes (see `engine.cli.batch.ProgressListener`), a photo at a time.
    Raises:
        BackendError: Ray is missing, the cluster is not reached, has no GPU, or gives up.
    """
    try:
        # Its core warns of every pool of actors that their arguments are objects, which the command keeps alive.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ImportError as error:
        fix = "pip install 'ray[data]'"
        raise BackendError("--ray needs a library", found=f"no module {error.name}", fix=fix) from error
    with _output_to_errors():
        try:
            _check_reachable(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            found = str(error).strip().splitlines()[0]
            fix = "start one with 'ray start --head', and give its address, or auto on its head"
            raise BackendError("no Ray cluster there", where=f"--ray {address}", found=found, fix=fix) from error
        try:
            yield from _stream(jobs, plan, uses_gpu, watch)
        except RayError as error:
            found = str(error).strip().splitlines()[-1]
            raise BackendError("the Ray cluster gave up", where=f"--ray {address}", found=found) from error
        finally:
            ray.shutdown()  # which also prints what it has kept back


@contextlib.contextmanager
def _output_to_errors() -> Iterator[None]:
    """Send what is printed to standard error: Ray's core, which is no Python, tells of lost workers on the output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _stream(jobs: Sequence[PhotoJob], plan: WorkerConfig, uses_gpu: bool, watch: ProgressListener) -> Iterator[Outcome]:
    import ray

    cpus, actors = _share(ray.nodes(), uses_gpu, plan.engine["threads"])
    ray.data.DataContext.get_current().enable_progress_bars = False  # the command has its own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield from (Outcome(job, error=job.error) for job in jobs if not plan.is_work(job))
    rows = [
        {"index": index, "job": pickle.dumps(_absolute(job))} for index, job in enumerate(jobs) if plan.is_work(job)
    ]
    if not rows:
        return
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Actor,
        fn_constructor_args=(plan,),
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(rows))),
        num_cpus=cpus,
        num_gpus=1 if uses_gpu else 0,
    )
    for row in done.iter_rows():
        notes, outcome = pickle.loads(row["outcome"])
        job = jobs[row["index"]]
        names = {str(output.absolute()): str(output) for _, output in job.outputs}
        reports = tuple(
            {**report, "input": str(job.photo), "output": names[report["output"]]} for report in outcome.reports
        )
        outcome = replace(outcome, job=_named(outcome.job, job), reports=reports)
        yield replay(notes, outcome, job, plan.settings.steps, watch)


class _Actor:
    """Restores photos on one machine of the cluster."""

    def __init__(self, plan: WorkerConfig) -> None:
        self._work = ExitStack().enter_context(plan.open())  # until the actor's process ends

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        notes = Notes()
        (outcome,) = restore_all([pickle.loads(row["job"])], self._work, notes)
        return {"index": row["index"], "outcome": pickle.dumps((notes.texts, outcome))}


def _check_reachable(address: str) -> None:
    """Find out whether anything answers at HOST:PORT, which Ray tries for minutes.

    Raises:
        OSError: nothing does, or the name is not known.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def _share(nodes: Sequence[dict[str, Any]], uses_gpu: bool, threads: int) -> tuple[float, int]:
    """Return how many processors an actor takes, and how many actors the cluster holds.

    Raises:
        BackendError: GPUs are needed, and there are none.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    if uses_gpu:
        gpus = sum(int(each.get("GPU", 0)) for each in resources)
        if not gpus:
            raise BackendError("the Ray cluster has no GPU", fix="add --backend onnxruntime, for a bundle of graphs")
        return 1, gpus
    counts = [int(each.get("CPU", 0)) for each in resources if each.get("CPU", 0) >= 1]
    if not counts:
        raise BackendError("the Ray cluster has no processor to offer", fix="start its machines with --num-cpus")
    cpus = min(threads or min(counts), max(counts))
    return cpus, sum(count // cpus for count in counts)


def _absolute(job: PhotoJob) -> PhotoJob:
    outputs = tuple((seed, output.absolute()) for seed, output in job.outputs)
    return PhotoJob(job.photo.absolute(), outputs, tuple(path.absolute() for path in job.done))


def _named(done: PhotoJob, job: PhotoJob) -> PhotoJob:
    """Return a job as it came back, under the names that it was given."""
    names = {path.absolute(): path for path in (*job.done, *(output for _, output in job.outputs))}
    return PhotoJob(
        job.photo, tuple((seed, names[path]) for seed, path in done.outputs), tuple(map(names.__getitem__, done.done))
    )


def gpu_is_used(device: str, backend: str) -> bool:
    """Tell whether a restorer works on a GPU; which one of a machine's is Ray's to say.

    Raises:
        UsageError: the device is one certain GPU.
    """
    if ":" in device:
        raise UsageError("which GPU is Ray's to choose", where="--device", expected="auto, cpu or cuda", found=device)
    return device == "cuda" or (device == "auto" and backend in PLAN_BACKENDS)
