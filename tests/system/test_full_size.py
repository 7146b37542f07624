"""Files of the real models' size: what their headers tell, before anything large is read.

The files have every tensor of the real ones in the header, and holes for data, so they cost no disk.
What needs the data is in tests/full_size.
"""

import json
import math
import resource
import struct

import pytest
from conftest import DATA

pytest.importorskip("torch", reason="needs the export extra")

LIMIT_S = 10
SDXL, SUPIR = "sdxl.safetensors", "supir.safetensors"


def write_hollow(path, tensors):
    """Write a safetensors file of fp16 tensors without their data."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def manifest():
    return json.loads((DATA / "full_manifest.json").read_text())["files"]


@pytest.fixture
def run(manifest, tiny, tmp_path, run_build):
    """Run a build of hollow files, some tensors of which are changed; returns it and its CPU seconds."""

    def build(*options, **changes):
        for file, tensors in manifest.items():
            changed = {name: changes.get(name, shape) for name, shape in tensors.items()}
            write_hollow(tmp_path / file, {name: shape for name, shape in changed.items() if shape is not None})
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_build(
            *("--sdxl", tmp_path / SDXL, "--supir", tmp_path / SUPIR, "--tokenizer", tiny.tokenizer),
            *("--preset", "lightning", "--precision", "fp16", "--output", tmp_path / "bundle", *options),
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert not (tmp_path / "bundle").exists()
        return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return build


def test_the_plan_of_a_build_is_told_from_headers(run):
    done, seconds = run("--dry-run")
    assert done.returncode == 0, done.stderr
    assert "4,801,177,779 parameters, 9.84 GB" in done.stdout
    assert "unet             fp16" in done.stdout
    assert seconds < LIMIT_S


@pytest.mark.parametrize(
    ("tensor", "shape", "said"),
    [
        (
            "model.diffusion_model.output_blocks.2.1.transformer_blocks.9.ff.net.2.weight",
            None,
            ("a tensor is missing", "output_blocks.2.1.transformer_blocks.9.ff.net.2.weight"),
        ),
        (
            "first_stage_model.denoise_encoder.mid.attn_1.k.weight",
            [512, 512, 3, 1],
            ("shape", "first_stage_model.denoise_encoder.mid.attn_1.k.weight", "[512, 512, 3, 1]"),
        ),
        (
            "model.control_model.middle_block.1.proj_in.weight",
            [1280, 1281],
            ("shape", "model.control_model.middle_block.1.proj_in.weight", "[1280, 1281]"),
        ),
    ],
)
def test_a_tensor_that_is_missing_or_misshapen_is_named_at_once(run, tensor, shape, said):
    done, seconds = run(**{tensor: shape})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in done.stderr
    assert seconds < LIMIT_S
