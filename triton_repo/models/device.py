"""Where the server has put an instance of a model, and whom it shares that place with."""

from __future__ import annotations

import os

from triton_repo.cpu_lock import FairLock, NoLock
from triton_repo.runtime_dir import runtime_dir
from triton_repo.serving import ServingConfig


def device_of(arguments: dict[str, str]) -> str:
    """Return the engine's name of the device that an instance's `initialize` was told."""
    if arguments["model_instance_kind"] == "GPU":
        return f"cuda:{arguments['model_instance_device_id']}"
    return "cpu"


def cpu_lock_of(arguments: dict[str, str], serving: ServingConfig) -> FairLock | NoLock:
    """Return the lock that an instance's networks run under: a real one where each of them uses all cores of a CPU.

    Raises:
        UsageError: see `runtime_dir`.
    """
    leaves_cores_free = 0 < serving.threads < (os.cpu_count() or 1)
    return NoLock() if device_of(arguments) != "cpu" or leaves_cores_free else FairLock(runtime_dir())
