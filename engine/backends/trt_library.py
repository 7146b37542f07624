"""TensorRT and TensorRT-RTX: two libraries with one API. Which of them is used is decided here alone."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from engine.errors import BackendError, first_line

#: Backends that run plans, with the module of each and what installs it.
_MODULES = {
    "tensorrt": ("tensorrt", "install TensorRT 10.12 or newer from NVIDIA's package index or container"),
    "tensorrt-rtx": ("tensorrt_rtx", "pip install 'restoration-engine[tensorrt-rtx]'"),
}
PLAN_BACKENDS = tuple(_MODULES)
#: The builder's flag of plans whose weights may lie on the host.
WEIGHT_STREAMING = "WEIGHT_STREAMING"
#: How the libraries say that memory was missing, such as "Cuda Runtime (out of memory)" or "OutOfMemory".
_NO_MEMORY = re.compile(
    r"out.?of.?memory|(insufficient|not enough) memory|bad_alloc|allocat\w* fail|"
    r"(fail\w* to|could not|cannot|unable to) (be )?allocate",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class TrtLibrary:
    """A library that compiles graphs to plans and runs them.

    Attributes:
        backend: the project's name for it.
        api: its module.
        version: that plans belong to.
    """

    backend: str
    api: Any
    version: str

    @property
    def label(self) -> str:
        """What a plan records of it, such as "tensorrt-rtx 1.7.1.116"."""
        return f"{self.backend} {self.version}"

    @property
    def is_rtx(self) -> bool:
        """Whether plans can be compiled without the GPU that they are for."""
        return self.backend == "tensorrt-rtx"


def open_library(backend: str) -> TrtLibrary:
    """Import the library of a backend.

    Args:
        backend: one of `PLAN_BACKENDS`.
    Raises:
        BackendError: it is not installed, or does not load.
    """
    module, remedy = _MODULES[backend]
    fix = f"{remedy}; without it, --backend onnxruntime runs bundles that were built for it"
    try:
        api = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BackendError(f"--backend {backend} needs {module}, which is not installed", fix=fix) from error
    except (ImportError, OSError, RuntimeError) as error:  # the package is there, its libraries are not
        raise BackendError(f"{module} does not load", found=first_line(error), fix=fix) from error
    if not hasattr(api, "Builder"):  # the stub that pip finds on the public index
        raise BackendError(f"{module} is a stub without a library", found=getattr(api, "__file__", module), fix=fix)
    return TrtLibrary(backend, api, str(api.__version__))


def is_lack_of_memory(message: str) -> bool:
    """Tell whether a library's message says that memory was missing."""
    return _NO_MEMORY.search(message) is not None


def make_log(api: Any) -> Any:
    """Return a logger that keeps the last error, for ours to tell it.

    Errors that follow one about memory are its consequences and do not replace it.
    """

    class Log(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity not in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                return
            if not is_lack_of_memory(self.last) or is_lack_of_memory(message):
                self.last = " ".join(message.split())[:500]

    return Log()
