"""What a figure was measured on: it goes into every result."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("restoration-engine", "numpy", "onnxruntime", "torch", "diffusers", "transformers")
#: What runs on GPUs; named where it is installed.
GPU_PACKAGES = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-core", "cuda-bindings", "triton")
_ASKED = ("name", "driver_version", "memory.total", "power.limit")


def describe_machine() -> dict[str, object]:
    """Return processor, cores, memory, GPUs, system and versions, as plain data."""
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
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": describe_gpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def describe_gpus() -> list[dict[str, str]]:
    """Return name, driver and limits of each GPU as `nvidia-smi` tells them; none where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a driver that does not answer: then nothing is known of it
        return []
    lines = [line.split(", ") for line in told.splitlines()]
    return [dict(zip(_ASKED, line, strict=True)) for line in lines if len(line) == len(_ASKED)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return (
        f"{found.get('model name', platform.machine())} (family {found.get('cpu family')}, model {found.get('model')})"
    )


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
