"""Tracing several graphs at once, each in a process of its own, while the build goes on with others.

A trace is Python from beginning to end, so it keeps one core busy, and SDXL's UNet for minutes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import onnx

from engine.errors import BuildError
from export.graphs import GraphBuilder
from export.to_onnx import is_cached, trace

#: Each process holds torch and a trace: about 1 GB for SDXL's UNet.
_MAX_PROCESSES = 4


@contextmanager
def traced_ahead(builders: Iterable[GraphBuilder]) -> Iterator[Callable[[GraphBuilder], onnx.ModelProto]]:
    """Start tracing what the cache lacks, the largest graph first; gives a `trace` that waits for its turn.

    Args:
        builders: of the graphs that will be asked for.
    Raises:
        BuildError: from what is given: a process was ended from outside.
    """
    todo = sorted((each for each in builders if not is_cached(each)), key=lambda each: -len(each.parameters))
    processes = min(os.cpu_count() or 1, len(todo), _MAX_PROCESSES)
    if processes < 2:
        yield trace
        return
    # Not forked: torch may have threads by now, which a fork does not survive.
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _leave_interrupts_to_the_parent)
    traces = {each.spec.name: pool.submit(_keep_trace, each) for each in todo}
    ours = [child for child in multiprocessing.active_children() if child not in others]

    def traced(builder: GraphBuilder) -> onnx.ModelProto:
        if builder.spec.name in traces:
            try:
                traces[builder.spec.name].result()
            except BrokenProcessPool as error:
                raise BuildError(
                    "the process that traced the graph was ended",
                    where=builder.spec.name,
                    fix="see whether memory is short, and start the build again",
                ) from error
        return trace(builder)

    try:
        yield traced
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if not all(each.done() for each in traces.values()):
            for child in ours:
                child.terminate()


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _keep_trace(builder: GraphBuilder) -> None:
    trace(builder)  # the cache is what the parent reads; a graph of SDXL is megabytes
