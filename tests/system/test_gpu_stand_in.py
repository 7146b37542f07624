"""The scenarios of the GPU path, on the stand-in for NVIDIA's driver; see `tests/gpu_stand_in`.

The driver must be the first that a process loads, so each file has a process of its own.
"""

import re
import subprocess
from pathlib import Path

import pytest
from gpu_stand_in import build
from gpu_stand_in.__main__ import command

SCENARIOS = Path(build.__file__).parent / "scenarios"
FILES = sorted(SCENARIOS.glob("test_*.py"))
#: Compiles plans for one test.
SLOW = "test_half_precision"


def test_there_are_scenarios():
    assert len(FILES) > 3


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Where the processes keep the bundles that they share."""
    return tmp_path_factory.mktemp("stand-in") / "bundles"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "file",
    [pytest.param(file, id=file.stem, marks=pytest.mark.slow if file.stem == SLOW else ()) for file in FILES],
)
def test_the_gpu_path_does_its_work_on_the_stand_in(file, request, tmp_path, bundles, record_property):
    pytest.importorskip("torch", reason="needs the export extra")
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")
    pytest.importorskip("cuda.core", reason="needs the cuda extra")
    if reason := build.missing():
        pytest.skip(reason)
    options = ["--slow"] if request.config.getoption("--slow") else []
    line, environment = command(str(file), "-q", f"--basetemp={tmp_path / 'pytest'}", *options)
    environment["STAND_IN_BUNDLES"] = str(bundles)
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(line, env=environment, cwd=build.ROOT, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1:]
    record_property("scenarios", summary)
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-2000:]}"
    assert re.search(r"\d+ passed", done.stdout), summary
