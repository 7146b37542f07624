"""Puts the stand-in into a process, before anything in it asks for a driver."""

from __future__ import annotations

import sys

from gpu_stand_in import driver


def install() -> None:
    """Load the driver, and play the libraries."""
    driver.library()  # before anything asks for libcuda.so.1
    driver.device()
    from gpu_stand_in import played_onnxruntime, played_tensorrt

    sys.modules.update(played_tensorrt.make_modules())
    played_onnxruntime.install()
