"""Backends by name; a library is imported only when its backend is asked for."""

from __future__ import annotations

from engine.backends.base import Backend
from engine.backends.trt_library import PLAN_BACKENDS
from engine.errors import UsageError

BACKENDS = ("onnxruntime", *PLAN_BACKENDS)
#: More CPU threads than this are a mistake: there is a pool of them for each graph.
MAX_THREADS = 256


def make_backend(name: str, *, threads: int = 0) -> Backend:
    """Return the backend called `name`.

    Args:
        name: one of `BACKENDS`.
        threads: that one operator may use on a CPU; 0 is one per core.
    Raises:
        UsageError: there is no such backend, or the number of threads is impossible.
    """
    if not 0 <= threads <= MAX_THREADS:
        raise UsageError("impossible number of threads", expected=f"0 to {MAX_THREADS}", found=threads)
    if name != "onnxruntime":
        raise UsageError("no such backend", expected=", ".join(BACKENDS), found=name)
    from engine.backends.ort import OrtBackend

    return OrtBackend(threads)
