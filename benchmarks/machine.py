"""What a figure was measured on: it goes into every result."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from engine.device.cuda_library import driver_version
from engine.device.interface import Device
from engine.memory.host_memory import total_memory_bytes

PACKAGES = ("restoration-engine", "numpy", "onnxruntime", "openvino", "torch", "diffusers", "transformers")
#: What runs on GPUs; named where it is installed.
GPU_PACKAGES = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-core", "cuda-bindings", "triton")


def describe_machine() -> dict[str, object]:
    """Return processor, cores, memory, system and versions, as plain data."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    for package in GPU_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(total_memory_bytes() / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def describe_device(device: Device) -> dict[str, Any]:
    """Return name, compute capability, memory and driver of a GPU, as plain data."""
    free, total = device.memory_bytes()
    return {
        "name": device.name,
        "compute_capability": device.compute_capability,
        "memory_bytes": total,
        "free_bytes": free,
        "driver": _driver(),
        "driver_cuda_version": driver_version(),
    }


def _driver() -> str | None:
    """Return what the driver calls itself; only Linux has this file."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return (
        f"{found.get('model name', platform.machine())} (family {found.get('cpu family')}, model {found.get('model')})"
    )
