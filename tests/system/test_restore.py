"""`python -m engine.restore` as its users call it: real files in, real files out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from engine import Restorer
from engine.cli.console import run_command
from engine.image.files import read_photo, read_provenance
from engine.restore import main


@pytest.fixture
def restore(bundle_fp32, capsys):
    """Run the command in this process; returns (status, stdout, stderr)."""

    def call(*arguments):
        status = run_command(main, ["--bundle", str(bundle_fp32), *map(str, arguments)])
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


@pytest.fixture
def photo(photo_path, tmp_path):
    return shutil.copy(photo_path, tmp_path / "cup.jpg")


def test_a_photo_is_restored_beside_itself(run_restore, bundle_fp32, photo):
    done = run_restore(photo, "--bundle", bundle_fp32)
    assert done.returncode == 0, done.stderr
    result = photo.with_name("cup.restored.png")
    assert str(result) in done.stdout
    assert "100%" in done.stderr
    assert "3/3" in done.stderr  # a bar over steps
    restored = read_photo(result)
    assert restored.size == read_photo(photo).size
    assert restored.rgb.std() > 0.05
    assert sorted(path.name for path in photo.parent.iterdir()) == ["cup.jpg", "cup.restored.png"]


def test_json_tells_settings_seed_times_and_memory(restore, photo, tmp_path):
    status, out, _ = restore(photo, "-o", tmp_path / "out.png", "--json", "--seed", 7, "--quiet", "--upscale", 1.5)
    assert status == 0
    (report,) = json.loads(out)
    assert report["settings"]["seed"] == 7
    assert report["input_size"] == [384, 256]
    assert report["output_size"] == [576, 384]
    assert Image.open(tmp_path / "out.png").size == (576, 384)
    assert set(report["graphs_ms"]) >= {"text", "denoise encoder", "stage 1", "controlnet", "unet", "vae decoder"}
    assert all(value >= 0 for value in report["graphs_ms"].values())
    assert report["total_ms"] == pytest.approx(
        sum(report["graphs_ms"].values()) + sum(report["outside_ms"].values()), abs=2
    )
    assert report["peak_memory_bytes"] > 10e6
    assert len(report["bundle"]["digest"]) == 64


def test_like_makes_a_result_again(restore, photo, tmp_path):
    first, again, other = (tmp_path / name for name in ("first.png", "again.webp.png", "other.png"))
    options = ["--seed", 11, "--steps", 4, "--cfg-scale", "1:3", "--restore-pull", 3, "--prompt", 'a "cup", Tässchen']
    assert restore(photo, "-o", first, *options)[0] == 0
    assert restore(photo, "-o", again, "--like", first)[0] == 0
    assert restore(photo, "-o", other, "--like", first, "--no-restore-pull", "--seed", 12)[0] == 0
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    assert read_provenance(first)["settings"] == read_provenance(again)["settings"]
    assert read_provenance(first)["settings"]["prompt"] == 'a "cup", Tässchen'
    changed = read_provenance(other)["settings"]
    assert (changed["seed"], changed["restore_pull"], changed["steps"]) == (12, None, 4)
    assert not np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(other)))


def test_like_says_when_the_bundle_is_another(restore, bundle_fp16, photo, tmp_path):
    status, _, err = restore(photo, "-o", tmp_path / "a.png", "--steps", 1)
    assert status == 0
    assert "another bundle" not in err
    status, _, err = restore(photo, "-o", tmp_path / "b.png", "--like", tmp_path / "a.png", "--bundle", bundle_fp16)
    assert status == 0
    assert "a.png was made with another bundle" in err


def test_a_preset_is_what_its_settings_are(restore, photo, tmp_path):
    Image.open(photo).reduce(4).save(photo)
    named, spelled, changed = (tmp_path / name for name in ("named.png", "spelled.png", "changed.png"))
    assert restore(photo, "-o", named, "--preset", "lightning-8", "--seed", 3)[0] == 0
    assert restore(photo, "-o", spelled, "--sampler", "dpmpp2m", "--cfg-scale", "2:1.5", "--seed", 3)[0] == 0
    assert restore(photo, "-o", changed, "--preset", "lightning-8", "--steps", 2)[0] == 0  # which beats the preset's
    assert np.array_equal(np.asarray(Image.open(named)), np.asarray(Image.open(spelled)))
    made = {path.name: read_provenance(path) for path in (named, spelled, changed)}
    assert made["named.png"]["settings"] == made["spelled.png"]["settings"]
    assert made["changed.png"]["settings"]["steps"] == 2
    assert made["changed.png"]["settings"]["sampler"] == "dpmpp2m"
    assert [each.get("preset") for each in made.values()] == ["lightning-8", None, "lightning-8"]


def test_a_preset_that_the_bundle_lacks_is_told_with_those_it_has(restore, photo, tmp_path):
    status, _, err = restore(photo, "-o", tmp_path / "out.png", "--preset", "fast")
    assert status == 2
    assert "the bundle has no such preset" in err
    assert "expected: lightning, lightning-8\n" in err
    assert not (tmp_path / "out.png").exists()


def test_samples_have_successive_seeds(restore, photo, tmp_path):
    status, out, _ = restore(photo, "-o", tmp_path / "out.png", "--samples", 2, "--seed", 5, "--steps", 2)
    assert status == 0
    assert [path.name for path in sorted(tmp_path.glob("out*"))] == ["out.5.png", "out.6.png"]
    assert [read_provenance(tmp_path / f"out.{seed}.png")["settings"]["seed"] for seed in (5, 6)] == [5, 6]
    assert out.count("seed") == 2


def test_a_folder_and_a_bad_file_in_it(restore, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "c.jpg"):
        shutil.copy(photo, folder / name)
    (folder / "b.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not read at all")
    status, _, err = restore(folder, "-o", tmp_path / "out", "--steps", 1)
    assert status == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    assert "b.jpg: is not an image" in err
    assert "1 of 3 photos could not be restored" in err
    assert "Traceback" not in err


def test_alpha_profile_orientation_and_metadata_come_back(restore, tmp_path):
    from PIL import ExifTags, ImageCms

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 90, 4), dtype=np.uint8), "RGBA")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored lying, shown standing
    exif[ExifTags.Base.Artist] = "Someone"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "in.png", exif=exif, icc_profile=profile, dpi=(72, 72))
    assert restore(tmp_path / "in.png", "-o", tmp_path / "out.png", "--steps", 1)[0] == 0
    result = read_photo(tmp_path / "out.png")
    assert result.size == (60, 90)
    assert np.array_equal(result.alpha, read_photo(tmp_path / "in.png").alpha)
    assert result.icc_profile == profile
    kept = Image.Exif()
    kept.load(result.exif)
    assert kept[ExifTags.Base.Artist] == "Someone"


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 31), (300, 20)])
def test_every_size_comes_back_as_it_was(restore, tmp_path, size):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / "in.png")
    assert restore(tmp_path / "in.png", "-o", tmp_path / "out.png", "--steps", 1)[0] == 0
    assert Image.open(tmp_path / "out.png").size == size
    assert restore(tmp_path / "in.png", "-o", tmp_path / "two.png", "--steps", 1, "--upscale", 2)[0] == 0
    assert Image.open(tmp_path / "two.png").size == (2 * size[0], 2 * size[1])


def test_interrupting_leaves_nothing_behind(bundle_fp32, photo, tmp_path):
    command = [sys.executable, "-m", "engine.restore", str(photo), "--bundle", str(bundle_fp32), "--steps", "500"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        seen = b""
        while not re.search(rb" [1-9]\d*/500", seen):  # it has begun to sample
            read = os.read(process.stderr.fileno(), 4096)
            assert read, "it ended by itself"
            seen += read
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert b"interrupted" in rest
    assert b"Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["cup.jpg"]


def test_a_photo_is_never_replaced_by_its_result(restore, photo):
    before = photo.read_bytes()
    status, _, err = restore(photo, "-o", photo, "--overwrite")
    assert status == 1
    assert "would replace a photo" in err
    assert photo.read_bytes() == before


def test_a_photo_is_not_replaced_by_another_ones_result(restore, photo):
    second = shutil.copy(photo, photo.with_name("cup.restored.png.jpg"))
    second = second.rename(photo.with_name("cup.restored.png"))
    before = second.read_bytes()
    status, _, err = restore(photo, second, "--overwrite", "--steps", 1)
    assert status == 1
    assert "cup.restored.png: would replace a photo" in err
    assert second.read_bytes() == before


def test_a_folder_is_gone_through_again_without_its_results(restore, photo, tmp_path):
    (tmp_path / ".hidden.jpg").write_text("no image")
    for _ in range(2):
        assert restore(tmp_path, "--steps", 1, "--overwrite")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden.jpg", "cup.jpg", "cup.restored.png"]


def test_what_has_a_result_can_be_left_out(restore, photo, tmp_path):
    shutil.copy(photo, tmp_path / "tea.jpg")
    (tmp_path / "cup.restored.png").write_bytes(b"as it was")
    status, _, err = restore(tmp_path, "--steps", 1)
    assert status == 1
    assert "cup.restored.png: exists already" in err
    status, out, _ = restore(tmp_path, "--steps", 1, "--skip-existing")
    assert status == 0
    assert out.count("seed") == 1
    assert (tmp_path / "cup.restored.png").read_bytes() == b"as it was"
    assert read_photo(tmp_path / "tea.restored.png").size == (384, 256)


def test_photos_of_one_stem_keep_their_whole_names(restore, photo, tmp_path):
    Image.open(photo).save(tmp_path / "cup.png")
    shutil.copy(photo, tmp_path / "tea.jpg")
    assert restore(tmp_path, "-o", tmp_path / "out", "--steps", 1)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cup.jpg.png", "cup.png.png", "tea.png"]


def test_options_that_do_nothing_are_told(restore, photo, tmp_path):
    _, _, err = restore(photo, "-o", tmp_path / "a.png", "--steps", 1, "--churn", 5, "--sampler", "dpmpp2m")
    assert "--churn does nothing with --sampler dpmpp2m" in err
    _, _, err = restore(photo, "-o", tmp_path / "b.png", "--steps", 1, "--eta", 0.5)
    assert "--eta does nothing with --sampler edm" in err


def test_more_threads_than_cores_give_the_same(restore, photo, tmp_path):
    for threads in (1, 2, 4 * os.cpu_count()):
        assert restore(photo, "-o", tmp_path / f"{threads}.png", "--steps", 1, "--threads", threads)[0] == 0
    first, *others = (np.asarray(Image.open(path)).astype(int) for path in sorted(tmp_path.glob("*.png")))
    for other in others:
        assert np.abs(first - other).max() <= 1


def test_openvino_gives_the_same_whatever_its_threads_and_the_result_says_how_it_was_made(restore, photo, tmp_path):
    openvino = pytest.importorskip("openvino", reason="needs the openvino extra")
    options = ("--steps", 1, "--backend", "openvino", "--compute", "fp32", "--quiet")
    for threads in (1, 4 * os.cpu_count()):
        assert restore(photo, "-o", tmp_path / f"{threads}.png", "--threads", threads, *options)[0] == 0
    first, other = (path.read_bytes() for path in tmp_path.glob("*.png"))
    assert other == first
    made = read_provenance(tmp_path / "1.png")
    assert made["backend"] == {"library": f"openvino {openvino.__version__.split('-')[0]}", "compute": "fp32"}
    # Another backend takes its settings, and gives the same picture but for the last bit.
    assert restore(photo, "-o", tmp_path / "like.png", "--like", tmp_path / "1.png", "--quiet")[0] == 0
    assert read_provenance(tmp_path / "like.png")["backend"]["library"].startswith("onnxruntime ")
    pictures = [np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("1.png", "like.png")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_transparency_follows_the_upscale(restore, tmp_path):
    glass = np.zeros((40, 60, 4), np.uint8)
    glass[:, 30:, 3] = 255
    Image.fromarray(glass, "RGBA").save(tmp_path / "in.png")
    assert restore(tmp_path / "in.png", "-o", tmp_path / "out.png", "--steps", 1, "--upscale", 2)[0] == 0
    alpha = np.asarray(Image.open(tmp_path / "out.png"))[:, :, 3]
    assert alpha.shape == (80, 120)
    assert (alpha[:, :55] == 0).all()
    assert (alpha[:, 65:] == 255).all()


def test_help_names_every_setting(run_restore):
    text = run_restore("--help").stdout
    from engine.settings import Settings

    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize("steps", [1, 0])
def test_the_command_closes_what_it_opened(bundle_fp32, photo_path, tmp_path, monkeypatch, steps):
    """Also where it fails; a GPU's compiled kernels are kept when a restorer is closed."""
    from engine.cli.command import restore

    closed = []
    close = Restorer.close
    monkeypatch.setattr(Restorer, "close", lambda self: (closed.append(self), close(self)))
    arguments = [photo_path, "-o", tmp_path / "out.png", "--bundle", bundle_fp32, "--steps", steps, "--quiet"]
    assert run_command(restore, list(map(str, arguments))) == (0 if steps else 2)
    assert len(closed) == 1
