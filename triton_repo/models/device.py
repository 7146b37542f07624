"""Where the server has put an instance of a member."""

from __future__ import annotations


def device_of(arguments: dict[str, str]) -> str:
    """Return the engine's name of the device that an instance's `initialize` was told."""
    if arguments["model_instance_kind"] == "GPU":
        return f"cuda:{arguments['model_instance_device_id']}"
    return "cpu"
