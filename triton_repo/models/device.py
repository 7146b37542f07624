"""What an instance of a member runs networks with, where the server has put it."""

from __future__ import annotations

import os

from engine.backends import make_backend
from engine.backends.base import Backend
from triton_repo.meeting import meeting_folder
from triton_repo.serving import Serving
from triton_repo.turns import InTurns


def backend_of(arguments: dict[str, str], serving: Serving) -> Backend:
    """Return the backend for an instance, by what its `initialize` was told.

    On a CPU whose cores one pass uses all, networks run in turns.
    """
    if arguments["model_instance_kind"] == "GPU":
        return make_backend(serving.backend, device=f"cuda:{arguments['model_instance_device_id']}")
    backend = make_backend(serving.backend, device="cpu", threads=serving.threads)
    has_room_beside = 0 < serving.threads < (os.cpu_count() or 1)
    return backend if has_room_beside else InTurns(backend, meeting_folder())
