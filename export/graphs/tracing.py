"""Tracing several graphs at once, each in a process of its own, while the build goes on with others.

A trace is Python from beginning to end, so it keeps one core busy, and SDXL's UNet for minutes.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from engine.errors import BuildError
from export.graphs.builder import GraphBuilder
from export.graphs.to_onnx import find_cached, trace
from export.graphs.traces import Trace

#: Each process holds torch and a trace: about 1 GB for SDXL's UNet.
_MAX_PROCESSES = 4


@contextmanager
def traced_ahead(builders: Iterable[GraphBuilder]) -> Iterator[Callable[[GraphBuilder], Trace]]:
    """Start tracing what the cache lacks, the largest graph first; gives a `trace` that waits for its turn.

    Args:
        builders: of the graphs that will be asked for.
    Raises:
        BuildError: from what is given: a process was ended from outside.
    """
    missing = [each for each in builders if find_cached(each.definition) is None]
    todo = sorted(missing, key=lambda each: -len(each.parameters))
    processes = min(os.cpu_count() or 1, len(todo), _MAX_PROCESSES)
    if processes < 2:
        yield trace
        return
    tracer = _Tracer()
    pool = ThreadPoolExecutor(processes)
    statuses = {each.spec.name: pool.submit(tracer.trace, each) for each in todo}

    def traced(builder: GraphBuilder) -> Trace:
        if builder.spec.name in statuses and statuses[builder.spec.name].result() < 0:
            raise BuildError(
                "the process that traced the graph was ended",
                where=builder.spec.name,
                fix="see whether memory is short, and start the build again",
            )
        return trace(builder)  # from the cache; where the process has failed, it fails here too, and is told as it is

    try:
        yield traced
    finally:
        tracer.stop()
        pool.shutdown(cancel_futures=True)


class _Tracer:
    """Runs this module as a program: multiprocessing would run the caller's, which may be a build itself."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def trace(self, builder: GraphBuilder) -> int:
        """Trace a graph into the cache; returns the process's status, below 0 if a signal has ended it."""
        if self._stopped:
            return -signal.SIGTERM
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with subprocess.Popen(
            [sys.executable, "-m", "export.graphs.tracing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        ) as process:
            self.running.add(process)
            if self._stopped:  # while it was started
                process.terminate()
            process.communicate(pickle.dumps(builder))
            self.running.discard(process)
        return process.returncode

    def stop(self) -> None:
        """End what is running, and start nothing more."""
        self._stopped = True
        for process in list(self.running):
            process.terminate()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's to hear, which ends this
    trace(pickle.load(sys.stdin.buffer))
