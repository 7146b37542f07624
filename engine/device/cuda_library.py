"""`cuda.core` and the driver behind it: which versions do, and their errors in our words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

from engine.errors import BackendError, OutOfMemoryError

#: Of `cuda.core`: older ones have no `Stream.is_closed`.
LEAST_CUDA_CORE = (1, 2)
_INSTALL = "pip install 'restoration-engine[tensorrt-rtx]'"
_WITHOUT = "without a GPU, --backend onnxruntime runs bundles of --precision fp32 or fp16"


@lru_cache(maxsize=1)
def cuda_core() -> ModuleType:
    """Return `cuda.core`.

    Raises:
        BackendError: it is not installed, or too old.
    """
    try:
        import cuda.core as core
    except ModuleNotFoundError as error:
        raise BackendError(
            "running on a GPU needs cuda-python, which is not installed",
            found=f"no module {error.name}",
            fix=f"{_INSTALL}; {_WITHOUT}",
        ) from error
    version = str(core.__version__)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST_CUDA_CORE:
        least = ".".join(map(str, LEAST_CUDA_CORE))
        raise BackendError(
            "cuda-core is too old", expected=f"{least} or newer", found=version, fix=f"pip install 'cuda-core>={least}'"
        )
    return core


def cuda_driver() -> Any:
    """Return the driver's functions."""
    from cuda.bindings import driver

    return driver


def driver_version() -> str:
    """Return the newest CUDA that the driver knows, such as "13.0".

    Raises:
        BackendError: there is no driver, or it does not tell.
    """
    with translated("tell its driver's version"):
        driver = cuda_driver()
        status, version = driver.cuDriverGetVersion()
    check(driver, status, "tell its driver's version")
    return f"{version // 1000}.{version % 1000 // 10}"


def check_driver() -> None:
    """Find out whether the driver takes kernels of this CUDA: those of its own major version, and of older ones.

    Raises:
        BackendError: there is no driver, or it is too old.
    """
    from cuda.bindings import __version__ as bindings

    needed, found = int(bindings.split(".")[0]), driver_version()
    if int(found.split(".")[0]) < needed:
        raise BackendError(
            "the GPU's driver is too old",
            expected=f"one for CUDA {needed}.0 or newer",
            found=f"one for CUDA {found}",
            fix=f"install a newer driver (nvidia-smi shows its version, and its CUDA's); {_WITHOUT}",
        )


def check(driver: Any, status: Any, action: str) -> None:
    """Raise the error of a call to the driver that failed.

    Args:
        driver: the functions.
        status: that the call returned.
        action: what it was to do, as in "tell its driver's version".
    Raises:
        OutOfMemoryError: memory does not suffice.
        BackendError: anything else.
    """
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        found = name.decode() if name else str(status)
        if "OUT_OF_MEMORY" in found:
            raise OutOfMemoryError("out of GPU memory", found=f"the GPU could not {action}: {found}")
        raise BackendError(f"the GPU could not {action}", found=found)


@contextmanager
def translated(action: str) -> Iterator[None]:
    """Tell the errors of `cuda.core` in our words.

    Args:
        action: what was being done, as in "upload".
    """
    try:
        yield
    except Exception as error:
        # cuda.core's own have several bases; all other exceptions are bugs, and stay what they are.
        if not type(error).__module__.startswith("cuda.") and not isinstance(error, RuntimeError):
            raise
        text = " ".join(str(error).split())
        if type(error).__name__ == "DynamicLibNotFoundError" or "INSUFFICIENT_DRIVER" in text or "NO_DEVICE" in text:
            driver = "driver" in text.lower() or "NO_DEVICE" in text
            missing = "an NVIDIA GPU with its driver" if driver else "a CUDA library"
            raise BackendError(
                f"running on a GPU needs {missing}, which is missing or too old",
                found=text[:200],
                fix=f"{'install the driver' if driver else _INSTALL}; {_WITHOUT}",
            ) from error
        if "OUT_OF_MEMORY" in text:
            raise OutOfMemoryError("out of GPU memory", found=text[:200]) from error
        raise BackendError(f"the GPU could not {action}", found=text[:300]) from error
