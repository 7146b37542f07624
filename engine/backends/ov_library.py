"""The OpenVINO library: importing it, its devices, the types that they compute in, and its errors in our words."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast, get_args

from engine.bundle.graphspec import Precision
from engine.errors import BackendError, OutOfMemoryError, UsageError

#: What `--compute` takes: "auto" is the fastest type that the bundle allows and the processor computes well.
Compute = Literal["auto", "fp32", "bf16"]
COMPUTES: tuple[str, ...] = get_args(Compute)
#: `--device` as OpenVINO calls it.
OV_DEVICES = {"auto": "CPU", "cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
#: OpenVINO's names of the types.
OV_TYPES: dict[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}

INSTALL = "pip install 'restoration-engine[openvino]'"
#: The oldest release that reads compiled models without weights where those are ONNX external data; 2026.3 does not.
OLDEST = (2026, 4)
_ELSEWHERE = "without it, --backend onnxruntime runs the same bundles"
#: What OpenVINO, oneDNN, OpenCL and the C++ library say where memory runs out.
_NO_MEMORY = re.compile(
    r"bad_alloc|out.?of.?(\w+.)?memory|(cannot|can't|failed to|could not) allocate|not enough memory", re.I
)


@dataclass(frozen=True)
class OvLibrary:
    """OpenVINO, and the device that it is to use.

    Attributes:
        api: its module.
        core: its list of devices, which reads and compiles models.
        version: that compiled models belong to, with the build.
        device: OpenVINO's name of it: "CPU", "GPU" or "NPU".
    """

    api: Any
    core: Any
    version: str
    device: str

    @property
    def label(self) -> str:
        """What a result records, such as "openvino 2026.4.1"."""
        return f"openvino {self.version.split('-')[0]}"

    @property
    def device_name(self) -> str:
        """The processor's own name, such as "Intel(R) Xeon(R) Processor"."""
        return str(self.core.get_property(self.device, "FULL_DEVICE_NAME"))


def is_installed() -> bool:
    """Tell whether an OpenVINO is installed that is new enough; it is not imported."""
    try:
        version = metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return False
    return _release(version) >= OLDEST


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def open_library(device: str) -> OvLibrary:
    """Import OpenVINO and look for a device.

    Args:
        device: one of `OV_DEVICES`.
    Raises:
        BackendError: OpenVINO is missing, too old or does not load; or there is no such device.
    """
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise BackendError(
            "--backend openvino needs openvino, which is not installed", fix=f"{INSTALL}; {_ELSEWHERE}"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # the package is there, its libraries are not
        raise BackendError("openvino does not load", found=reason(error), fix=f"{INSTALL}; {_ELSEWHERE}") from error
    version = str(openvino.__version__)
    if _release(version) < OLDEST:
        raise BackendError(
            "this OpenVINO is too old",
            expected=f"{'.'.join(map(str, OLDEST))} or newer",
            found=version,
            fix=f"pip install --upgrade openvino; {_ELSEWHERE}",
        )
    core = openvino.Core()
    found = OvLibrary(openvino, core, version, OV_DEVICES[device])
    # OpenVINO numbers several devices of a kind: GPU.0, GPU.1.
    if not any(name.split(".")[0] == found.device for name in core.available_devices):
        raise BackendError(
            f"--device {device}: OpenVINO finds none",
            found=", ".join(core.available_devices),
            fix="install Intel's driver for it, as OpenVINO's installation guide says, or use --device cpu",
        )
    return found


# -- types ----------------------------------------------------------------------------------------


def choose_compute(library: OvLibrary, compute: Compute) -> Compute:
    """Check what a person asked for against what the device computes in; returns it.

    Raises:
        UsageError: there is no such type.
        BackendError: the device would compute in it slower, or not at all.
    """
    if compute not in COMPUTES:
        raise UsageError("no such type to compute in", where="--compute", expected=", ".join(COMPUTES), found=compute)
    if compute == "bf16" and library.device != "CPU":
        raise BackendError(
            "--compute bf16 is for CPUs",
            found=f"--device {library.device.lower()}",
            fix="leave it out: the graphs are computed in the types that they are written in",
        )
    if compute == "bf16" and cpu_flags() and not {"amx_bf16", "avx512_bf16"} & cpu_flags():
        raise BackendError(
            "--compute bf16: this processor has no bf16 units, and would take three to four times as long as in fp32",
            found=library.device_name,
            expected="a processor with amx_bf16 or avx512_bf16",
            fix="leave it out, which computes in fp32 here",
        )
    return compute


def compute_of(library: OvLibrary, compute: Compute, bundle: Precision, graph: Precision) -> Precision:
    """Return the type that a graph is computed in.

    Args:
        library: of the device.
        compute: as asked for.
        bundle: the bundle's precision; fp32 is computed in fp32 unless a person says otherwise.
        graph: the graph's precision, fp32 for an fp16 bundle's VAE. GPUs and NPUs compute in it, but in fp32 for bf16.
    """
    if compute != "auto":
        return cast(Precision, compute)
    if library.device != "CPU":
        return "fp32" if graph == "bf16" else graph
    return "bf16" if bundle != "fp32" and is_faster_in_bf16() else "fp32"


def is_faster_in_bf16() -> bool:
    """Tell whether this processor computes faster in bf16: with AMX's matrix units, or AMD's AVX-512 products.

    OpenVINO lists BF16 as a capability of every processor with AVX-512. Measured against fp32: with AMX a third of the
    time, on an AMD EPYC (family 25, model 17) with AVX512_BF16 two thirds. On an Intel Xeon whose AMX was hidden (by
    ONEDNN_MAX_CPU_ISA) it was 1.3 times as long with AVX512_BF16, and 3.3 to 3.7 times without.
    Source: benchmarks/results/latency-openvino-2026-11-29.json, latency-cpu-bf16-2026-11-29.json.
    """
    return "amx_bf16" in cpu_flags() or ("avx512_bf16" in cpu_flags() and _cpu_fact("vendor_id") == "AuthenticAMD")


def cpu_flags() -> frozenset[str]:
    """Return the processor's instruction sets by Linux's names; none where the system does not tell."""
    return frozenset(_cpu_fact("flags").split())


def _cpu_fact(name: str) -> str:
    """Return what Linux tells of the first processor under a name; nothing where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")


# -- errors ---------------------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """Return the line of an error that says something: OpenVINO's begin with places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("Exception from ")]
    return (said or lines or [type(error).__name__])[-1][:300]


def translated(error: Exception, graph: str, doing: str) -> Exception:
    """Return an error of OpenVINO in our words; others as they are.

    Args:
        error: as caught.
        graph: its name, or a file.
        doing: "compile" or "run".
    """
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        fix = {
            "compile": "close other programs, or use a bundle of smaller weights: --precision bf16",
            "run": "restore at a smaller size: a lower --upscale or --min-size",
        }[doing]
        return OutOfMemoryError(
            "out of memory" if doing == "run" else "out of memory while the graph is compiled",
            where=graph,
            found=reason(error),
            fix=fix,
        )
    if isinstance(error, RuntimeError) and type(error).__module__ in ("builtins", "openvino.exceptions"):
        return BackendError(f"OpenVINO cannot {doing} the graph", where=graph, found=reason(error))
    return error
