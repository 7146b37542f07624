"""Wrong input, as a table: arguments, exit status, what the message says; and nothing is left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from engine.cli.console import run_command
from engine.restore import main as restore_main


@pytest.fixture
def place(photo_path, tmp_path):
    """A folder of things that are wrong in different ways."""
    shutil.copy(photo_path, tmp_path / "cup.jpg")
    (tmp_path / "text.png").write_text("hello")
    whole = (tmp_path / "cup.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "there.png").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "cup.jpg", tmp_path / "cup.png")
    Image.new("RGBA", (40, 40)).save(tmp_path / "glass.png")
    Image.new("RGB", (1, 9000)).save(tmp_path / "thread.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "frames.gif").write_bytes(b"")
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "frames.gif", save_all=True, append_images=frames[1:])
    return tmp_path


def snapshot(folder):
    """Every path, folders too, and what the files hold."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


RESTORE = [
    (["nothing.jpg"], 1, "nothing.jpg: no such file"),
    (["text.png"], 1, "text.png: is not an image"),
    (["half.jpg"], 1, "half.jpg: is truncated or damaged"),
    (["empty.png"], 1, "empty.png: is not an image"),
    (["folder"], 1, "folder: holds no images"),
    (["thread.png", "--min-size", "1024"], 1, "too large for the memory of this computer"),
    (["cup.jpg", "--tile", "100"], 2, "tiles of this size do not exist"),
    (["cup.jpg", "-o", "there.png"], 1, "there.png: exists already"),
    (["cup.jpg", "-o", "missing/out.png"], 1, "missing: no such folder"),
    (["cup.jpg", "-o", "missing/out"], 1, "no such folder"),
    (["cup.jpg", "-o", "there.png/out.png"], 1, "there.png: is no folder"),
    (["cup.jpg", "-o", "dangling.png"], 1, "dangling.png: exists already"),
    (["cup.jpg", "-o", "/dev/null"], 1, "/dev/null: is no folder"),
    (["text.png", "-o", "newdir"], 1, "text.png: is not an image"),
    (["cup.jpg", "-o", "x" * 300 + ".png"], 1, "the name is too long"),
    (["x" * 300 + ".png"], 1, "the name is too long"),
    (["pipe.png"], 1, "pipe.png: is not a file"),
    (["frames.gif"], 1, "frames.gif: holds several pictures"),
    (["cup.jpg", "-o", "out.bmp"], 1, "no format that is written"),
    (["cup.jpg", "-o", "/proc/out.png"], 1, "/proc/out.png"),
    (["glass.png", "-o", "out.jpg"], 1, "cannot hold the photo's transparency"),
    (["cup.jpg", "cup.png", "-o", "one.png"], 2, "several photos need a folder"),
    (["cup.jpg", "./cup.jpg", "../{here}/cup.jpg", "-o", "folder"], 1, "two photos would be restored into one file"),
    (["cup.png", "-o", ".", "--overwrite"], 1, "would replace a photo"),
    (["cup.jpg", "--like", "nothing.png"], 1, "nothing.png: no such file"),
    (["cup.jpg", "--like", "glass.png"], 1, "glass.png: holds no settings"),
    (["cup.jpg", "--bundle", "folder"], 1, "folder: no bundle here"),
    (["cup.jpg", "--bundle", "there.png"], 1, "there.png: no bundle here"),
    (["cup.jpg", "--backend", "openvino", "--device", "cuda"], 2, "OpenVINO does not run on NVIDIA's GPUs"),
    (["cup.jpg", "--device", "gpu"], 2, "--device gpu is Intel's, for --backend openvino"),
    (["cup.jpg", "--compute", "bf16"], 2, "only OpenVINO can compute in another type"),
    (["cup.jpg", "--steps", "0"], 2, "impossible settings"),
    (["cup.jpg", "--steps", "1000000"], 2, "impossible settings"),
    (["cup.jpg", "--cfg-scale", "nan"], 2, "impossible settings"),
    (["cup.jpg", "--cfg-scale", "1e30"], 2, "must lie between -100 and 100"),
    (["cup.jpg", "--control-scale", "-1"], 2, "must lie between 0 and 100"),
    (["cup.jpg", "--upscale", "-1"], 2, "impossible settings"),
    (["cup.jpg", "--seed", "-1"], 2, "impossible settings"),
    (["cup.jpg", "--restore-pull", "0"], 2, "impossible settings"),
]
USAGE = [
    ([], "the following arguments are required: IMG"),
    (["cup.jpg", "--steps", "many"], "invalid int value"),
    ([""], "expected a name, got an empty one"),
    (["cup.jpg", "-o", ""], "expected a name, got an empty one"),
    (["cup.jpg", "--bundle", ""], "expected a name, got an empty one"),
    (["cup.jpg", "--cfg-scale", "strong"], "expected S or S:END"),
    (["cup.jpg", "--samples", "x"], "expected 1 to 1000"),
    (["cup.jpg", "--threads", "100000"], "expected 0 (one per core) to 256"),
    (["cup.jpg", "--overwrite", "--skip-existing"], "not allowed with"),
    (["cup.jpg", "--over"], "unrecognized arguments"),
    (["cup.jpg", "--cfg-scale", "1:2:3"], "expected S or S:END"),
    (["cup.jpg", "--sampler", "ddim"], "invalid choice"),
    (["cup.jpg", "--backend", "tensorflow"], "invalid choice"),
    (["cup.jpg", "--compute", "int8"], "invalid choice"),
    (["cup.jpg", "--color-fix", "yes"], "invalid choice"),
    (["cup.jpg", "--samples", "0"], "expected 1 to 1000"),
    (["cup.jpg", "--threads", "-1"], "expected 0"),
    (["cup.jpg", "--restore-pull", "2", "--no-restore-pull"], "not allowed with"),
    (["cup.jpg", "--wat"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), RESTORE, ids=[" ".join(row[0]) for row in RESTORE])
def test_restore(place, bundle_fp32, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(place)
    before = snapshot(place)
    arguments = [argument.format(here=place.name) for argument in arguments]
    if "--bundle" not in arguments:
        arguments = [*arguments, "--bundle", str(bundle_fp32)]
    assert run_command(restore_main, arguments) == status
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert output.out == ""
    assert snapshot(place) == before


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(row[0]) or "nothing" for row in USAGE])
def test_restore_usage(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as ended:
        restore_main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_out_of_memory_is_no_bug(monkeypatch, capsys, bundle_fp32, photo_path, tmp_path):
    from engine.backends.ort import OrtRunner

    class Session:
        def run(self, names, inputs, options):
            raise RuntimeError("bad allocation: Failed to allocate memory for requested buffer of size 1234")

    def broken(self, inputs):
        self._session = Session()
        return infer_impl(self, inputs)

    infer_impl = OrtRunner.infer_impl
    monkeypatch.setattr(OrtRunner, "infer_impl", broken)
    arguments = [str(photo_path), "-o", str(tmp_path / "out.png"), "--bundle", str(bundle_fp32)]
    assert run_command(restore_main, arguments) == 1
    error = capsys.readouterr().err
    assert f"{photo_path}: denoise_encoder: out of memory" in error
    assert "1.23 kB more" in error
    assert "--min-size" in error
    assert list(tmp_path.iterdir()) == []


def test_a_photo_for_more_memory_than_there_is_is_refused(monkeypatch, capsys, bundle_fp32, place):
    """At the whole, which was asked for, the VAE's maps alone take 4 kB for each of 64 × 576,000 pixels."""
    monkeypatch.setattr("engine.memory.budget.available_memory_bytes", lambda: 16 * 10**9)
    arguments = [str(place / "thread.png"), "--bundle", str(bundle_fp32), "--min-size", "64", "--vae-tiles", "off"]
    assert run_command(restore_main, arguments) == 1
    error = capsys.readouterr().err
    assert "thread.png" in error
    assert "too large for the memory of this computer" in error
    assert "--vae-tiles auto uses tiles" in error


def test_networks_that_give_no_numbers_are_told(monkeypatch, capsys, bundle_fp32, place):
    from engine.backends.ort import OrtRunner

    def broken(self, inputs):
        return {name: value * np.nan for name, value in infer_impl(self, inputs).items()}

    infer_impl = OrtRunner.infer_impl
    monkeypatch.setattr(OrtRunner, "infer_impl", broken)
    arguments = [str(place / "cup.jpg"), "-o", str(place / "out.png"), "--bundle", str(bundle_fp32), "--steps", "1"]
    assert run_command(restore_main, arguments) == 1
    assert "values that are not finite" in capsys.readouterr().err
    assert not (place / "out.png").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["run_restore", "run_build"])
def test_output_that_cannot_be_printed_is_no_bug(command, request, bundle_fp32, photo_path, tmp_path):
    run = request.getfixturevalue(command)
    arguments = ["--dry-run"] if command == "run_build" else [photo_path, "-o", tmp_path / "o.png", "--steps", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *run.head, *map(str, arguments), "--quiet", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "RESTORE_BUNDLE": str(bundle_fp32)},
        )
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def wait_until_libraries_load(process):
    """Wait until a program has begun to load libraries: before that, Python itself is not ready for Ctrl-C."""
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():  # not on Linux
        time.sleep(0.3)
        return
    while process.poll() is None and not re.search(r"pydantic_core|_multiarray_umath", maps.read_text()):
        time.sleep(0.005)


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("head", [["-m", "engine.restore"], ["export/build_engines.py"]])
def test_interrupting_while_libraries_load(head, delay_s, photo_path, tmp_path):
    with subprocess.Popen(
        [sys.executable, *head, "--quiet", "--bundle" if "-m" in head else "--output", str(tmp_path / "b")]
        + ([str(photo_path)] if "-m" in head else []),
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        wait_until_libraries_load(process)
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert process.returncode in (130, 1, -signal.SIGINT)  # 1: there is no bundle, said before the signal came
    assert "Traceback" not in error
    assert "bug" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_changed_under_us_is_refused(bundle_fp32, photo_path, tmp_path, capsys):
    copy = shutil.copytree(bundle_fp32, tmp_path / "bundle")
    (copy / "unet.onnx").write_bytes((copy / "controlnet.onnx").read_bytes())
    assert run_command(restore_main, [str(photo_path), "-o", str(tmp_path / "o.png"), "--bundle", str(copy)]) == 1
    assert "unet.onnx: a file of the bundle was changed" in capsys.readouterr().err


@pytest.fixture
def build_main(tiny):
    from export.build_engines import main

    return main


BUILD = [
    (["--sdxl", "{sdxl}"], 2, "--supir is missing"),
    (["--supir", "{supir}"], 2, "--sdxl is missing"),
    (["--lora", "face={face}"], 1, "LoRA face"),  # of another model than the demo
    (["--sdxl", "{sdxl}", "--supir", "{supir}"], 1, "a single file holds no tokenizer"),
    (["--sdxl", "nothing.safetensors", "--supir", "{supir}", "--tokenizer", "{tokenizer}"], 1, "no such file"),
    (["--sdxl", "{supir}", "--supir", "{supir}", "--tokenizer", "{tokenizer}"], 1, "another model than --sdxl needs"),
    (["--sdxl", "{face}", "--supir", "{supir}", "--tokenizer", "{tokenizer}"], 1, "LoRA"),
    (["--sdxl", "{sdxl}", "--supir", "{sdxl}", "--tokenizer", "{tokenizer}"], 1, "another model than --supir needs"),
    (["--sdxl", "{sdxl}", "--supir", "text.png", "--tokenizer", "{tokenizer}"], 1, "text.png"),
    (["--sdxl", "{sdxl}", "--supir", "{supir}", "--tokenizer", "folder"], 1, "no tokenizer here"),
    (
        ["--sdxl", "{sdxl}", "--supir", "{supir}", "--tokenizer", "{tokenizer}", "--preset", "ours"],
        2,
        "preset ours merges LoRAs",
    ),
    (
        ["--sdxl", "{sdxl}", "--supir", "{supir}", "--tokenizer", "{tokenizer}", "--lora", "face=nothing.safetensors"],
        1,
        "LoRA face: nothing.safetensors: no such file",
    ),
    (
        ["--sdxl", "{sdxl}", "--supir", "{supir}", "--tokenizer", "{tokenizer}", "--lora", "face={supir}"],
        1,
        "LoRA face",
    ),
    (["--preset", "lightning", "--output", "folder2/../there.png"], 1, "something that is no bundle lies there"),
    (["--preset", "lightning", "--output", "."], 1, "something that is no bundle lies there"),
    (["--preset", "lightning", "--output", "there.png/bundle"], 1, "cannot build the bundle"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), BUILD, ids=[" ".join(row[0]) for row in BUILD])
def test_build(place, tiny, build_main, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(place)
    (place / "folder2").mkdir()
    before = snapshot(place)
    names = {"sdxl": tiny.sdxl, "supir": tiny.supir, "tokenizer": tiny.tokenizer, **tiny.loras}
    filled = [argument.format(**names) for argument in arguments]
    for option, value in (("--output", "bundle"), ("--preset", "lightning-8")):
        if option not in filled:
            filled += [option, value]
    assert run_command(build_main, [*filled, "--quiet"]) == status
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "face"], "expected NAME=FILE[:SCALE]"),
        (["--lora", "=file"], "expected NAME=FILE[:SCALE]"),
        (["--preset", "best"], "invalid choice"),
        (["--precision", "int8"], "invalid choice"),
        (["--backend", "tensorflow"], "invalid choice"),
    ],
)
def test_build_usage(build_main, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        build_main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("face=a.safetensors", ("face", "a.safetensors", 1.0)),
        ("face=a.safetensors:0.8", ("face", "a.safetensors", 0.8)),
        ("face=a.safetensors:-1", ("face", "a.safetensors", -1.0)),
        (r"face=C:\loras\a.safetensors", ("face", r"C:\loras\a.safetensors", 1.0)),
        ("a=b=c.safetensors:2", ("a", "b=c.safetensors", 2.0)),
    ],
)
def test_lora_option(tiny, text, expected):
    from export.build.command import _lora

    lora = _lora(text)
    assert (lora.name, str(lora.path), lora.scale) == expected
