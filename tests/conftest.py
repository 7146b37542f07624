"""What tests share: the reference outputs, the checkpoints that they are of, and bundles built from them.

Bundles are built once a session and never changed, also where pytest-xdist has several workers. Traces of their
networks lie in `data/traces`, so only tests of tracing trace.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

# PyTorch's threads meet after every operator, and spin until all are there. For networks as small as the tests' a
# second thread gains nothing, and where others want its core the meetings cost twenty times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a shell starts in the background ignores Ctrl-C, and so do its children; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # for `golden`, `layouts`, `skips` and `synthetic`
sys.path.insert(1, str(Path(__file__).parent / "attacks"))  # for `harness` and `readers`
os.environ["RESTORE_TRACES"] = str(DATA / "traces")  # of the networks that `reference` is of

from skips import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401, with CI set, few skips are allowed


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")
    parser.addoption("--full-size", action="store_true", help="run the tests that take an hour and 40 GB of disk")


def pytest_collection_modifyitems(config, items):
    for marker, option, reason in (
        ("slow", "--slow", "slow: takes minutes, run with --slow"),
        ("full_size", "--full-size", "full size: takes an hour and 40 GB of disk, make full-size"),
    ):
        if not config.getoption(option):
            for item in items:
                if marker in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def reference():
    """Outputs of the original implementation (see shared/reference/README.md)."""
    return dict(np.load(DATA / "reference" / "tiny.npz"))


@pytest.fixture(scope="session")
def cases():
    return json.loads((DATA / "reference" / "tiny_cases.json").read_text())["cases"]


@pytest.fixture(scope="session")
def photo_path():
    return DATA / "coffee.jpg"


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Call `make(folder)` in one worker of the session alone, the others wait for it; returns the folder."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made(name: str, make: Callable[[Path], object]) -> Path:
        from filelock import FileLock

        folder = shared / "made-once" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():  # it has its name when it is whole
                make(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def tiny():
    """Synthetic checkpoints, as files; the networks that `reference` is of."""
    pytest.importorskip("torch", reason="needs the export extra")
    from synthetic import tiny_files

    return tiny_files()


@pytest.fixture(scope="session")
def build_bundle(tiny):
    """Build a bundle of the synthetic checkpoints in-process; returns its folder."""
    from export.build.build_plan import make_plan
    from export.build.request import BuildRequest
    from export.build.steps import build

    def run(output: Path, **changes) -> Path:
        request = {
            "sdxl": tiny.sdxl,
            "supir": tiny.supir,
            "tokenizer": tiny.tokenizer,
            "preset": "lightning",
            "settings": {"min_size": 64, "steps": 3},
            **changes,
        }
        build(make_plan(BuildRequest(output=output, **request)), Silent(), lambda line: None)
        return output

    return run


@pytest.fixture(scope="session")
def bundle_fp32(build_bundle, once):
    return once("fp32", build_bundle)


@pytest.fixture(scope="session")
def bundle_fp16(build_bundle, once):
    return once("fp16", partial(build_bundle, precision="fp16"))


@pytest.fixture(scope="session")
def demo_bundle(once):
    """The demo as it is built by default: trained weights, both LoRAs."""
    pytest.importorskip("torch", reason="needs the export extra")
    from export.build_engines import main

    def build(folder: Path) -> None:
        assert main(["--output", str(folder), "--quiet"]) == 0

    return once("demo", build)


@pytest.fixture(scope="session")
def restorer(bundle_fp32):
    from engine import Restorer

    with Restorer.open(bundle_fp32) as opened:
        yield opened


@pytest.fixture(scope="session", params=["onnxruntime", "openvino"])
def each_restorer(request, bundle_fp32):
    """The fp32 bundle on each backend that runs on CPUs; files whose tests hold for all call it `restorer`."""
    from engine import Restorer

    if request.param == "openvino":
        pytest.importorskip("openvino", reason="needs the openvino extra")
    with Restorer.open(bundle_fp32, backend=request.param, compute="auto") as opened:
        yield opened


@pytest.fixture(scope="session")
def bf16_units():
    """Skip tests of bf16 where the processor would only imitate it, and nobody would use it."""
    from engine.backends.ov_library import is_faster_in_bf16

    if not is_faster_in_bf16():
        pytest.skip("cpu: needs units for bf16 (AMX, or AMD's AVX-512: amx_bf16, avx512_bf16 in /proc/cpuinfo)")


@pytest.fixture
def run_restore():
    """Run `python -m engine.restore` as a user does."""
    return _Command("-m", "engine.restore")


@pytest.fixture
def run_web():
    """Run `python -m engine.web` as a user does, where it ends by itself."""
    return _Command("-m", "engine.web")


@pytest.fixture
def run_build():
    """Run `python export/build_engines.py` as a user does."""
    return _Command(str(ROOT / "export" / "build_engines.py"))


@pytest.fixture(scope="session")
def gpu():
    """The first GPU; tests that need one are skipped, with the reason, where there is none."""
    from engine.device.cuda import CudaDevice
    from engine.errors import BackendError

    try:
        device = CudaDevice(0)
    except BackendError as error:
        pytest.skip(f"gpu: needs one of NVIDIA's ({error.found})")
    yield device
    device.close()


class _Command:
    def __init__(self, *head: str) -> None:
        self.head = head

    def __call__(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *self.head, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=280,
            check=False,
        )


class Silent:
    """A build's progress that nobody watches."""

    def stage(self, name):
        pass

    def advance(self, amount):
        pass


@pytest.fixture(scope="session")
def triton_programs():
    """A real tritonserver; installed once, into the user's cache, where it is missing."""
    pytest.importorskip("tritonclient.grpc", reason="needs the triton extra")
    from engine.errors import BackendError
    from triton_repo.environment import PYTHONS, find_programs

    if f"{sys.version_info[0]}.{sys.version_info[1]}" not in PYTHONS or sys.platform != "linux":
        pytest.skip(f"the server's wheel is for Linux and Python {', '.join(PYTHONS)}")
    try:
        return find_programs()
    except BackendError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no tritonserver runs here: {error}")


@pytest.fixture(scope="session")
def serve_bundle(triton_programs, tmp_path_factory):
    """Return a server of a bundle that is about to start, on free ports of the loopback interface."""
    from triton_repo.render import Request, render
    from triton_repo.repository import DeploymentConfig
    from triton_repo.server import Server, free_ports

    def make(bundle: Path, *, layout: DeploymentConfig | None = None, **limits) -> Server:
        folder = tmp_path_factory.mktemp("served")
        repository = folder / "repository"
        render(Request(bundle, repository, layout=layout or DeploymentConfig(), limits=limits))
        return Server(triton_programs, repository, folder / "server.log", ports=free_ports())

    return make


@pytest.fixture(scope="session")
def server(serve_bundle, demo_bundle):
    """A server of the demo that all tests share; those that harm a server have their own."""
    with serve_bundle(demo_bundle) as running:
        yield running
