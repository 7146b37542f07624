"""Photos on a Ray cluster: one of this computer, with two workers, one of which is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from engine import Restorer
from engine.cli.console import run_command
from engine.cli.ray_cluster import _share, gpu_is_used
from engine.errors import BackendError, UsageError
from engine.image.files import read_photo
from engine.restore import main

COUNT, STEPS = 12, 6


def make_photos(folder):
    folder.mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster with two processors, which ends with the tests."""
    ray = pytest.importorskip("ray", reason="needs the ray extra: pip install 'ray[data]'")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def workers():
    """The processes that hold a restorer; all of them are below this one."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def test_a_worker_is_killed_and_every_photo_is_finished_once(cluster, bundle_fp32, tmp_path):
    pytest.importorskip("psutil", reason="finds the workers' processes")
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    (photos / "bad.png").write_text("no image")
    command = [sys.executable, "-m", "engine.restore", "photos", "-o", "out", "--bundle", str(bundle_fp32), "--json"]
    command += [
        "--steps",
        str(STEPS),
        "--min-size",
        "64",
        "--threads",
        "1",
        "--ray",
        cluster,
        "--report",
        "report.html",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:
        while len(list(out.glob("*.png"))) < COUNT // 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        both = workers()
        both[0].send_signal(signal.SIGKILL)
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
        text, err = process.communicate(timeout=200)
    assert len(both) == 2
    assert process.returncode == 1
    assert "photos/bad.png: is not an image" in err
    assert "1 of 13 photos could not be restored" in err
    assert "Traceback" not in err
    names = [f"{number:02}.png" for number in range(COUNT)]
    assert sorted(path.name for path in out.glob("*.png")) == names
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert text.startswith("["), text[:500]  # nothing of Ray's beside the JSON
    made = [report["output"] for report in json.loads(text)]
    assert len(made) == len(set(made))
    assert set(made) <= {os.path.join("out", name) for name in names}
    assert len(made) >= COUNT - 1  # the killed worker may have written one whose report was lost with it
    page = (tmp_path / "report.html").read_text()
    assert page.count("<article>") == COUNT
    with Restorer.open(bundle_fp32, threads=1) as restorer:
        for name in (names[0], names[-1]):
            expected = restorer.restore(photos / name, steps=STEPS, min_size=64).photo.rgb
            assert np.abs(read_photo(out / name).rgb - expected).max() <= 0.51 / 255


def test_where_no_cluster_is(bundle_fp32, photo_path, tmp_path, capsys):
    pytest.importorskip("ray", reason="needs the ray extra: pip install 'ray[data]'")
    arguments = [photo_path, "-o", tmp_path / "o.png", "--bundle", bundle_fp32, "--ray", "127.0.0.1:9"]
    assert run_command(main, list(map(str, arguments))) == 1
    error = capsys.readouterr().err
    assert "--ray 127.0.0.1:9: no Ray cluster there" in error
    assert "ray start --head" in error
    assert "Traceback" not in error
    assert not (tmp_path / "o.png").exists()


def test_without_ray_it_is_told_what_to_install(bundle_fp32, photo_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = [photo_path, "-o", tmp_path / "o.png", "--bundle", bundle_fp32, "--ray", "auto"]
    assert run_command(main, list(map(str, arguments))) == 1
    error = capsys.readouterr().err
    assert "--ray needs a library" in error
    assert "pip install 'ray[data]'" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("resources", "threads", "expected"),
    [
        ([{"CPU": 16.0}], 0, (16, 1)),  # a restorer uses all processors of a machine
        ([{"CPU": 16.0}, {"CPU": 8.0}], 0, (8, 3)),
        ([{"CPU": 16.0}, {"CPU": 8.0}, {}], 4, (4, 6)),
        ([{"CPU": 2.0}], 8, (2, 1)),
    ],
)
def test_processors_are_shared(resources, threads, expected):
    nodes = [{"Alive": True, "Resources": each} for each in resources]
    dead = {"Alive": False, "Resources": {"CPU": 64.0}}
    assert _share([*nodes, dead], False, threads) == expected


def test_gpus_are_one_each():
    nodes = [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 8.0}}]
    assert _share(nodes, True, 0) == (1, 4)
    with pytest.raises(BackendError, match="has no GPU"):
        _share(nodes[1:], True, 0)


def test_which_gpu_is_rays_to_choose():
    assert gpu_is_used("auto", "tensorrt")
    assert gpu_is_used("cuda", "onnxruntime")
    assert not gpu_is_used("auto", "onnxruntime")
    assert not gpu_is_used("cpu", "onnxruntime")
    with pytest.raises(UsageError, match="Ray's to choose"):
        gpu_is_used("cuda:1", "tensorrt")
