"""Where the server has put an instance of a member, and whom it shares that place with."""

from __future__ import annotations

import os

from triton_repo.meeting import meeting_folder
from triton_repo.serving import ServingConfig
from triton_repo.turns import NoTurn, Turn


def device_of(arguments: dict[str, str]) -> str:
    """Return the engine's name of the device that an instance's `initialize` was told."""
    if arguments["model_instance_kind"] == "GPU":
        return f"cuda:{arguments['model_instance_device_id']}"
    return "cpu"


def turn_of(arguments: dict[str, str], serving: ServingConfig) -> Turn | NoTurn:
    """Return what an instance's networks run within: on a CPU all of whose cores each of them uses, their turn.

    Raises:
        UsageError: see `meeting_folder`.
    """
    leaves_cores_free = 0 < serving.threads < (os.cpu_count() or 1)
    return NoTurn() if device_of(arguments) != "cpu" or leaves_cores_free else Turn(meeting_folder())
