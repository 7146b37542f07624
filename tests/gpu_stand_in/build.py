"""The stand-in's two libraries, compiled once for all runs: the driver, and the engine's kernels for this processor."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from engine.bundle.storage import cache_dir
from engine.device.kernels import KERNELS, cuda_source

COMPILER = shutil.which("g++") or shutil.which("clang++")
ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).parent / "driver"
#: What CUDA's language adds to C++, as far as the kernels use it. A thread runs after the other.
_HOST_CUDA = """
#define __device__ static
#define __global__
struct Place { unsigned x; };
static Place blockIdx, blockDim, threadIdx;
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
"""
_RUN = """
extern "C" {{
int args_{name}[] = {{{sizes}, 0}};
void run_{name}(unsigned long long blocks, unsigned long long threads, void** p) {{
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {name}({passed});
}}
}}
"""


def missing() -> str | None:
    """Return what the driver cannot be compiled without and is not here, None if it is all here."""
    if COMPILER is None:
        return "needs a C++ compiler (g++)"
    if header_folder() is None:
        return "needs CUDA's headers (pip install nvidia-cuda-runtime)"
    return None


@cache
def header_folder() -> Path | None:
    """Return the folder of cuda.h in NVIDIA's package for CUDA 13, None if it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place) / "cu13" / "include"
        if (folder / "cuda.h").is_file():
            return folder
    return None


def driver_library() -> Path:
    """Return the driver's library, compiled if it is not in the cache."""
    headers = header_folder()
    assert headers is not None
    header = (headers / "cuda.h").read_text()
    sources = b"".join(file.read_bytes() for file in sorted(DRIVER.glob("*.cpp")))
    folder = _made_once(sources + header.encode())
    library = folder / "libcuda.so.1"
    if not library.exists():
        with _Built(library) as (partial, beside):
            (beside / "tables.h").write_text(tables(header))
            options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
            _compile(
                *options,
                f"-I{headers}",
                f"-I{beside}",
                DRIVER / "driver.cpp",
                "-o",
                partial,
                "-Wl,-soname,libcuda.so.1",
            )
    return library


def kernel_library() -> Path:
    """Return the engine's kernels for this processor: `run_NAME`, and `args_NAME` with the size of each argument."""
    source = _HOST_CUDA + cuda_source()
    for name in KERNELS:
        types = parameter_types(source, name)
        sizes = ", ".join("4" if each == "unsigned int" else "8" for each in types)
        passed = ", ".join(f"*({each}*)p[{index}]" for index, each in enumerate(types))
        source += _RUN.format(name=name, sizes=sizes, passed=passed)
    library = _made_once(source.encode()) / "kernels.so"
    if not library.exists():
        with _Built(library) as (partial, beside):
            (beside / "kernels.cpp").write_text(source)
            # Without fused multiplications, as the kernels ask for.
            _compile("-O2", "-ffp-contract=off", "-shared", "-fPIC", beside / "kernels.cpp", "-o", partial)
    return library


def parameter_types(source: str, kernel: str) -> list[str]:
    """Return the types of a kernel's parameters, in order."""
    head = source.split(f"void {kernel}(")[1].split(")")[0]
    return [part.strip().rpartition(" ")[0] for part in head.split(",")]


def tables(header: str) -> str:
    """Return C++ tables out of cuda.h: the newest version of each function, and the errors' names."""
    lines = ["static const char *NEWEST[][2] = {"]
    pattern = r"^\s*#\s*define\s+(cu[A-Z]\w+)\s+(?:__CUDA_API_PT[DS][SZ]\()?(cu\w+)\)?\s*$"
    lines += [f'  {{"{name}", "{real}"}},' for name, real in re.findall(pattern, header, re.M) if name != real]
    lines += ["  {0, 0}};", "static const struct { int code; const char *name; } ERRORS[] = {"]
    errors = header.split("typedef enum cudaError_enum {")[1].split("} CUresult;")[0]
    errors = re.sub(r"/\*.*?\*/", "", errors, flags=re.S)
    lines += [f'  {{{code}, "{name}"}},' for name, code in re.findall(r"(CUDA_\w+)\s*=\s*(\d+)", errors)]
    return "\n".join([*lines, "};", ""])


def _made_once(source: bytes) -> Path:
    return cache_dir() / "tests" / f"gpu-stand-in-{hashlib.sha256(source).hexdigest()[:16]}"


class _Built:
    """A library under construction: it gets its name when it is whole, so several processes may build at once."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._beside = library.parent / f".{os.getpid()}"

    def __enter__(self) -> tuple[Path, Path]:
        self._beside.mkdir(parents=True, exist_ok=True)
        return self._beside / self._library.name, self._beside

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            (self._beside / self._library.name).replace(self._library)
        shutil.rmtree(self._beside)


def _compile(*arguments: object) -> None:
    assert COMPILER is not None
    done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
