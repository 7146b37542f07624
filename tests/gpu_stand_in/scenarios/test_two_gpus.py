"""A folder on two GPUs of one computer, by the command itself: `--device cuda:all`, a process for each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gpu_stand_in import build
from PIL import Image

from engine.image.files import read_photo

COUNT = 6
CHILDREN = Path(build.__file__).parent / "children"


@pytest.fixture(scope="module")
def bundle(bundle_for):
    return bundle_for("rtx")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


BEGUN = []


@pytest.fixture(autouse=True)
def _end_what_is_left():
    yield
    for process in BEGUN:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)
    BEGUN.clear()


def begin(bundle, photos, *options, steps=3, **environment):
    path = os.pathsep.join(map(str, (CHILDREN, CHILDREN.parent.parent, build.ROOT)))
    line = [sys.executable, "-m", "engine.restore", str(photos), "-o", str(photos.parent / "out")]
    line += ["--bundle", str(bundle), "--device", "cuda:all", "--steps", str(steps), *options]
    variables = {**os.environ, "PYTHONPATH": path, "CUDA_STANDIN_DEVICES": "2", **environment}
    process = subprocess.Popen(
        line, env=variables, cwd=build.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    BEGUN.append(process)
    return process


def workers(process):
    """The command's processes that hold a GPU."""
    psutil = pytest.importorskip("psutil", reason="finds the workers' processes")
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        try:
            if "spawn_main" in " ".join(each.cmdline()):
                found.append(each)
        except psutil.Error:  # it has just ended
            continue
    return found


def wait_for(something, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not (found := something()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_two_gpus_share_a_folder_and_results_are_one_gpus(bundle, photos, restorer):
    (photos / "bad.png").write_text("no image")
    process = begin(bundle, photos, "--json")
    devices = wait_for(lambda: len(workers(process)) == 2, process)
    assert devices
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors  # for the bad one, which costs no other
    assert errors.count("bad.png") >= 1
    assert "1 of 7 photos could not be restored" in errors
    reports = json.loads(output)
    assert sorted(Path(report["output"]).name for report in reports) == [f"{number}.png" for number in range(COUNT)]
    for number in (0, COUNT - 1):
        wanted = restorer.restore(photos / f"{number}.png", steps=3).photo.rgb
        found = read_photo(photos.parent / "out" / f"{number}.png").rgb
        assert np.abs(found - wanted).max() <= 0.5 / 255 + 1e-6


@pytest.mark.timeout(600)
def test_ctrl_c_ends_all_and_the_next_run_goes_on(bundle, photos):
    process = begin(bundle, photos, steps=30)
    out = photos.parent / "out"
    held = wait_for(lambda: len(workers(process)) == 2 and workers(process), process)
    wait_for(lambda: list(out.glob("*.png")), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not [each for each in held if each.is_running()]
    assert not list(out.glob(".*"))  # no half file, no claim
    done = len(list(out.glob("*.png")))
    assert 0 < done < COUNT
    output, errors = begin(bundle, photos, steps=30).communicate(timeout=240)
    assert f"{done} had a result already" in output + errors
    assert len(list(out.glob("*.png"))) == COUNT


@pytest.mark.slow
def test_a_process_that_is_killed_costs_no_photo(bundle, photos):
    process = begin(bundle, photos, steps=30)
    held = wait_for(lambda: len(workers(process)) == 2 and workers(process), process)
    wait_for(lambda: list((photos.parent / "out").glob("*.png")), process)
    held[0].kill()
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "a GPU's process has ended" in errors
    assert "signal 9" in errors
    assert len(list((photos.parent / "out").glob("*.png"))) == COUNT


@pytest.mark.slow
def test_a_gpu_that_cannot_run_the_bundle_is_told_and_left_out(bundle, photos):
    _, errors = (process := begin(bundle, photos, CUDA_STANDIN_OTHERS="75")).communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "error: cuda:1:" in errors
    assert "the plan is not for this GPU" in errors
    assert len(list((photos.parent / "out").glob("*.png"))) == COUNT


@pytest.mark.slow
def test_where_no_gpu_can_the_first_error_is_the_commands(bundle, photos):
    process = begin(bundle, photos, "--backend", "tensorrt")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "the plan belongs to another library" in errors


@pytest.mark.slow
def test_one_photo_needs_one_gpu(bundle, photos):
    (process := begin(bundle, photos / "0.png")).communicate(timeout=240)
    assert process.returncode == 0


def test_a_cpus_backend_has_no_gpus(bundle, photos):
    _, errors = (process := begin(bundle, photos, "--backend", "openvino")).communicate(timeout=240)
    assert process.returncode == 2
    assert "OpenVINO does not run on NVIDIA's GPUs" in errors
