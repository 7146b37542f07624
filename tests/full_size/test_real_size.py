"""SDXL's and SUPIR's own sizes, with synthetic weights in their files' layouts: `make full-size`.

Latency, memory, layout, merging and building do not depend on the values. It takes about an hour on two
cores, 24 GB of memory and 40 GB of disk, in $RESTORE_FULL_SIZE or a temporary folder; the figures go to
`full-size.json` there.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import DATA, ROOT
from layouts import edit, write_diffusers_folder, write_diffusers_unet
from synthetic import write_checkpoints, write_lora

pytest.importorskip("torch", reason="needs the export extra")

from benchmarks.machine import describe_machine
from export.checkpoint.checkpoint import open_sdxl, open_supir, open_unet
from export.checkpoint.lora import merge_into, open_lora
from export.checkpoint.tokenizer import FILE

pytestmark = [pytest.mark.full_size, pytest.mark.timeout(7200)]

GB, GIB = 1e9, 2**30
DISK_GB, MEMORY_GB = 40, 22
RANK = 64


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    named = os.environ.get("RESTORE_FULL_SIZE")
    folder = Path(named) if named else tmp_path_factory.mktemp("full-size")
    folder.mkdir(parents=True, exist_ok=True)
    have = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if have < DISK_GB * GB or psutil.virtual_memory().total < MEMORY_GB * GB:
        pytest.skip(f"full size: needs {DISK_GB} GB of disk and {MEMORY_GB} GB of memory")
    return folder


@pytest.fixture(scope="module")
def note(work):
    """Keep figures, with the machine that they were measured on."""
    file = work / "full-size.json"

    def keep(name, **figures):
        found = json.loads(file.read_text()) if file.is_file() else {}
        found["machine"] = describe_machine()
        found[name] = figures
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n{name}: {figures}")

    return keep


@pytest.fixture(scope="module")
def files(work, tiny):
    """The two checkpoints, two LoRAs of rank 64 on all attention of the UNet, and the tokenizer."""
    manifest = json.loads((DATA / "full_manifest.json").read_text())
    for name in manifest["files"]:
        if not (work / name).is_file():
            (work / "part").mkdir(exist_ok=True)
            write_checkpoints(work / "part", {**manifest, "files": {name: manifest["files"][name]}}, "float16")
            (work / "part" / name).rename(work / name)
    for name in ("landscape", "face"):
        if not (work / f"{name}.safetensors").is_file():
            shapes = manifest["files"]["sdxl.safetensors"]
            write_lora(work / f"{name}.safetensors", shapes, name=name, rank=RANK, alpha=RANK / 2)
    shutil.copy(tiny.tokenizer / FILE, work / FILE)
    return work


def measured(*command):
    """Run a command; returns its output, seconds, and the most memory it held: its own, and with mapped files."""
    started, own, whole = time.monotonic(), 0, 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{watched.pid}/status").read_text().splitlines()
            except OSError:
                break
            sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
            anonymous, mapped = (int(sizes.get(key, 0)) * 1024 for key in ("RssAnon", "RssFile"))
            own, whole = max(own, anonymous), max(whole, anonymous + mapped)
            time.sleep(0.2)
        output = process.stdout.read()
    assert process.returncode == 0, output[-3000:]
    return output, {
        "seconds": round(time.monotonic() - started, 1),
        "own_gib": round(own / GIB, 2),
        "with_mapped_gib": round(whole / GIB, 2),
    }


def build_command(files, output, *options):
    return (
        *("export/build_engines.py", "--quiet", "--sdxl", files / "sdxl.safetensors"),
        *("--supir", files / "supir.safetensors", "--tokenizer", files, "--output", output, *options),
    )


def test_two_loras_of_rank_64_merge_within_20_seconds(files, note):
    tensors = open_sdxl(files / "sdxl.safetensors").tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    loras = [open_lora(name, files / f"{name}.safetensors", 1.0, shapes) for name in ("landscape", "face")]
    started, changed = time.monotonic(), 0
    for name, tensor in tensors.items():
        if name.startswith("unet."):
            base = tensor.read()
            changed += merge_into(base, name, loras) is not base
    seconds = time.monotonic() - started
    note("merging", seconds=round(seconds, 1), layers=changed, rank=RANK)
    assert changed == len(loras[0].deltas) > 500
    assert seconds < 20


def same(found, expected):
    assert set(found) == set(expected)
    return all(np.array_equal(found[name].read(), expected[name].read()) for name in found)


@pytest.mark.parametrize("layout", ["ckpt, fp32", "ckpt, fp16, bare", "UNet alone", "sharded folder"])
def test_every_layout_gives_the_same_tensors(files, note, tmp_path, layout):
    sdxl, supir = files / "sdxl.safetensors", files / "supir.safetensors"
    if layout == "ckpt, fp32":
        found, expected = open_supir(edit(supir, tmp_path / "supir.ckpt", dtype=np.float32)), open_supir(supir)
    elif layout == "ckpt, fp16, bare":
        bare = edit(supir, tmp_path / "bare.ckpt", rename=lambda name: name.removeprefix("model."))
        found, expected = open_supir(bare), open_supir(supir)
    elif layout == "UNet alone":
        found, expected = open_unet(write_diffusers_unet(sdxl, tmp_path / "unet.safetensors")), open_sdxl(sdxl)
        expected.tensors = {name: tensor for name, tensor in expected.tensors.items() if name.startswith("unet.")}
    else:
        found, expected = open_sdxl(write_diffusers_folder(sdxl, tmp_path / "folder", shards=3)), open_sdxl(sdxl)
    assert same(found.tensors, expected.tensors)
    note(f"layout: {layout}", tensors=len(found.tensors))


def test_graphs_and_plans_are_built_within_25_minutes_and_12_gib(files, note, work):
    loras = [part for name in ("landscape", "face") for part in ("--lora", f"{name}={files / name}.safetensors")]
    command = build_command(files, work / "rtx", "--backend", "tensorrt-rtx", *loras)
    _, figures = measured(*command)
    shutil.rmtree(work / "rtx")
    note("build fp16, plans for TensorRT-RTX", **figures)
    assert figures["own_gib"] < 12
    assert figures["seconds"] < 25 * 60


def test_a_photo_is_restored_on_a_cpu_within_20_gb(files, note, work):
    bundle = work / "cpu"
    _, building = measured(*build_command(files, bundle, "--preset", "lightning", "--precision", "fp16"))
    note("build fp16, ONNX Runtime", **building)
    photo, result = ROOT / "tests" / "data" / "coffee-damaged.jpg", work / "restored.png"
    output, figures = measured(
        *("-m", "engine.restore", photo, "-o", result, "--overwrite", "--quiet", "--json"),
        *("--bundle", bundle, "--min-size", 512, "--steps", 2),
    )
    stages = json.loads(output)
    note("restore 512 x 512, 2 steps, CPU", **figures, report=stages)
    assert result.stat().st_size > 0
    assert figures["with_mapped_gib"] * GIB < 20 * GB
    assert building["own_gib"] < 6
    assert building["seconds"] < 4 * 60
