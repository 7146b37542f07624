"""Folders of photos: what goes where, what is gone on with, what a bad photo costs, what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from engine import Restorer
from engine.cli.console import run_command
from engine.errors import printable
from engine.image.files import read_photo, read_provenance
from engine.restore import main


@pytest.fixture
def restore(bundle_fp32, capsys):
    """Run the command in this process; returns (status, stdout, stderr)."""

    def call(*arguments):
        status = run_command(main, ["--bundle", str(bundle_fp32), "--steps", "1", *map(str, arguments)])
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def make_photos(folder, names):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if name.endswith(".jfif") else None
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / name, kind)
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_subfolders_come_out_as_they_went_in(restore, tmp_path):
    photos = make_photos(tmp_path / "photos", ["a.png", "sub/a.jpg", "sub/deep/b.webp", ".hidden/c.png"])
    assert restore(photos, "-o", tmp_path / "flat")[0] == 0
    assert files(tmp_path / "flat") == ["a.png"]
    # The results lie inside of what is looked through, and are not taken for photos.
    for made in (3, 0):
        status, out, err = restore(photos, "-o", photos / "out", "--recursive")
        assert status == 0, err
        assert out.count("seed") == made
        assert files(photos / "out") == ["a.png", "sub/a.png", "sub/deep/b.png"]


def test_a_folder_without_images_says_where_they_may_be(restore, tmp_path):
    make_photos(tmp_path / "photos", ["sub/a.png"])
    status, _, err = restore(tmp_path / "photos")
    assert status == 1
    assert "look into its subfolders with --recursive" in err


def test_the_same_command_goes_on_and_another_is_asked_about(restore, tmp_path):
    photos = make_photos(tmp_path / "photos", ["a.png", "b.png"])
    out = tmp_path / "out"
    assert restore(photos, "-o", out)[0] == 0
    before = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    make_photos(photos, ["c.png"])
    status, text, _ = restore(photos, "-o", out)
    assert status == 0
    assert text.splitlines()[1].startswith("3 photos: 1 restored, 2 had a result already")
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before

    status, _, err = restore(photos, "-o", out, "--seed", 5)
    assert status == 1
    assert "a.png: exists already" in err
    assert "--skip-existing" in err
    assert restore(photos, "-o", out, "--seed", 5, "--skip-existing")[1].startswith("3 photos: 0 restored, 3 had")
    assert restore(photos, "-o", out, "--seed", 5, "--overwrite")[0] == 0
    assert {read_provenance(path)["settings"]["seed"] for path in out.iterdir()} == {5}


def test_a_photo_that_was_changed_is_not_taken_for_restored(restore, tmp_path):
    photos = make_photos(tmp_path / "photos", ["a.png"])
    assert restore(photos, "-o", tmp_path / "out")[0] == 0
    later = time.time() + 10
    os.utime(photos / "a.png", (later, later))
    status, _, err = restore(photos, "-o", tmp_path / "out")
    assert status == 1
    assert "an older photo" in err


def test_bad_files_stop_nothing_and_are_told_at_the_end(restore, tmp_path):
    photos = make_photos(tmp_path / "photos", ["a.png", "d.png", "f.png"])
    (photos / "b.png").write_text("no image")
    (photos / "c.png").write_bytes((photos / "a.png").read_bytes()[:5000])
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(photos / "e.gif", save_all=True, append_images=frames[1:])
    status, out, err = restore(photos, "-o", tmp_path / "out")
    assert status == 1
    assert files(tmp_path / "out") == ["a.png", "d.png", "f.png"]
    summary, *failed = out.splitlines()[3:]
    assert summary.startswith("6 photos: 3 restored, 3 failed, in ")
    assert [line.split(": ")[1:3] for line in failed] == [
        [str(photos / "b.png"), "is not an image, or of a format that is not read"],
        [str(photos / "c.png"), failed[1].split(": ")[2]],
        [str(photos / "e.gif"), "holds several pictures (2 of them)"],
    ]
    assert "damaged" in failed[1]
    assert "3 of 6 photos could not be restored" in err
    assert "3/3" in err  # the bar's steps are those of the photos that could be restored


def test_a_bug_costs_one_photo(restore, tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos", ["a.png", "b.png", "c.png"])
    whole = Restorer.restore

    def broken(self, photo, **changes):
        calls.append(photo)
        if len(calls) == 2:
            raise ZeroDivisionError("by nothing")
        return whole(self, photo, **changes)

    calls = []
    monkeypatch.setattr(Restorer, "restore", broken)
    status, out, err = restore(photos, "-o", tmp_path / "out")
    assert status == 1
    assert files(tmp_path / "out") == ["a.png", "c.png"]
    assert f"failed: {photos / 'b.png'}: this is a bug (ZeroDivisionError: by nothing)" in out
    assert "Traceback" in err


def test_a_full_disk_is_told_for_each_photo(restore, tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos", ["a.png", "b.png"])

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, out, _ = restore(photos, "-o", tmp_path / "out")
    assert status == 1
    assert out.count("cannot write the image: the disk is full") == 2
    assert files(tmp_path / "out") == []


def test_the_next_is_read_and_the_last_written_while_the_networks_run(restore, tmp_path, monkeypatch):
    """Each stage waits for what can only happen if the others go on: alone, it would wait in vain."""
    from engine.cli.batch import BatchRunner

    photos = make_photos(tmp_path / "photos", ["a.png", "b.png", "c.png"])
    read_b, wrote_a, restoring_b = threading.Event(), threading.Event(), threading.Event()
    read, work, write = BatchRunner.read, BatchRunner.restore, BatchRunner.write
    seen = []

    def reading(self, job):
        photo = read(self, job)
        if job.photo.name == "b.png":
            read_b.set()
        return photo

    def restoring(self, *arguments):
        if len(seen) == 0:
            seen.append(read_b.wait(60))
        elif len(seen) == 1:
            restoring_b.set()
            seen.append(wrote_a.wait(60))
        return work(self, *arguments)

    def writing(self, job, output, result):
        if output.name == "a.png":
            seen.append(restoring_b.wait(60))
        write(self, job, output, result)
        if output.name == "a.png":
            wrote_a.set()

    monkeypatch.setattr(BatchRunner, "read", reading)
    monkeypatch.setattr(BatchRunner, "restore", restoring)
    monkeypatch.setattr(BatchRunner, "write", writing)
    assert restore(photos, "-o", tmp_path / "out")[0] == 0
    assert seen == [True, True, True]
    assert files(tmp_path / "out") == ["a.png", "b.png", "c.png"]


def test_results_do_not_depend_on_their_neighbours(restore, tmp_path):
    photos = make_photos(tmp_path / "photos", ["a.png", "b.png"])
    assert restore(photos, "-o", tmp_path / "out")[0] == 0
    assert restore(photos / "b.png", "-o", tmp_path / "alone.png")[0] == 0
    assert np.array_equal(read_photo(tmp_path / "alone.png").rgb, read_photo(tmp_path / "out" / "b.png").rgb)


def test_sixteen_bits_come_out_as_sixteen(restore, tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs", reason="needs the test extra")
    ramp = np.linspace(0, 65535, 64 * 64 * 3).astype(np.uint16).reshape(64, 64, 3)
    (tmp_path / "in.png").write_bytes(imagecodecs.png_encode(ramp))
    assert restore(tmp_path / "in.png", "-o", tmp_path / "out.png")[0] == 0
    result = imagecodecs.png_decode((tmp_path / "out.png").read_bytes())
    assert result.dtype == np.uint16
    assert len(np.unique(result)) > 1000  # 8 bits have 256 values


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.txt", "no name of a page"),
        ("missing/report.html", "missing: no such folder"),
        ("mine.html", "exists already"),
    ],
)
def test_reports_that_cannot_be_written_are_told_before_the_work(restore, tmp_path, name, message):
    photos = make_photos(tmp_path / "photos", ["a.png"])
    (tmp_path / "mine.html").write_text("<p>my own page</p>")
    status, _, err = restore(photos, "-o", tmp_path / "out", "--report", tmp_path / name)
    assert status == 1
    assert message in err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine.html").read_text() == "<p>my own page</p>"


@pytest.mark.parametrize("count", [8, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_in_the_middle_and_started_again(bundle_fp32, tmp_path, count):
    """Kill −9, start again: all outputs are there and right, and none was made twice."""
    names = [f"{number:02}.png" for number in range(count)]
    photos, out = make_photos(tmp_path / "photos", names), tmp_path / "out"
    command = [sys.executable, "-m", "engine.restore", str(photos), "-o", str(out), "--bundle", str(bundle_fp32)]
    command += ["--steps", "1", "--min-size", "64", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while len(list(out.glob("*.png"))) < count // 2:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    first = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.glob("*.png")}
    assert count // 2 <= len(first) < count
    for name in first:  # what has its name is whole
        read_photo(out / name)

    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    made = [os.path.basename(report["output"]) for report in json.loads(done.stdout)]
    assert made == sorted(set(names) - set(first))
    assert {name: (os.stat(out / name).st_mtime_ns, os.stat(out / name).st_ino) for name in first} == first
    with Restorer.open(bundle_fp32, threads=1) as restorer:
        for name in (names[0], names[count // 2], names[-1]):
            expected = restorer.restore(photos / name, steps=1, min_size=64).photo.rgb
            assert np.abs(read_photo(out / name).rgb - expected).max() <= 0.51 / 255
    for name in names:
        assert read_photo(out / name).size == (64, 64)
    assert sorted(path.name for path in out.glob("*.png")) == names


# -- formats, odd names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "magic"), [("jpeg", b"\xff\xd8"), ("webp", b"RIFF"), ("tiff", b"II*")])
def test_a_folder_is_written_in_the_format_that_is_asked_for(restore, tmp_path, name, magic):
    photos = make_photos(tmp_path / "photos", ["a.png", "sub/b.jpg"])
    assert restore(photos, "-o", tmp_path / "out", "--recursive", "--format", name)[0] == 0
    suffix = {"jpeg": "jpg", "tiff": "tif"}.get(name, name)
    assert files(tmp_path / "out") == [f"a.{suffix}", f"sub/b.{suffix}"]
    assert all((tmp_path / "out" / each).read_bytes().startswith(magic) for each in files(tmp_path / "out"))
    before = (tmp_path / "out" / f"a.{suffix}").stat().st_mtime_ns
    assert restore(photos, "-o", tmp_path / "out", "--recursive", "--format", name)[0] == 0  # goes on
    assert (tmp_path / "out" / f"a.{suffix}").stat().st_mtime_ns == before


def test_each_photo_may_keep_its_format(restore, tmp_path):
    photos = make_photos(tmp_path / "photos", ["a.png", "b.JPG", "c.webp", "d.bmp", "e.jfif", "f.jpg", "f.png"])
    assert restore(photos, "-o", tmp_path / "out", "--format", "same")[0] == 0
    assert files(tmp_path / "out") == ["a.png", "b.JPG", "c.webp", "d.png", "e.jfif", "f.jpg", "f.png"]
    assert restore(photos / "b.JPG", "--format", "same")[0] == 0
    assert (photos / "b.restored.JPG").exists()


def test_quality_makes_files_smaller(restore, tmp_path):
    photos = make_photos(tmp_path / "photos", ["a.png"])
    for quality in (30, 95):
        assert restore(photos, "-o", tmp_path / f"{quality}", "--format", "webp", "--quality", quality)[0] == 0
    assert restore(photos / "a.png", "-o", tmp_path / "a.jpg", "--quality", 30)[0] == 0
    small, large = (tmp_path / each / "a.webp" for each in ("30", "95"))
    assert 2 * small.stat().st_size < large.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.jpg", "--format", "webp"], "another format"),
        (["-o", "out.png", "--quality", "80"], "no quality to choose"),
        (["--quality", "80"], "no quality to choose"),
    ],
)
def test_options_that_contradict_each_other_are_told(restore, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", ["a.png"])
    status, _, err = restore("photos/a.png", *arguments)
    assert status == 2
    assert message in err


def test_a_name_that_is_not_utf8_breaks_no_report_and_no_json(run_restore, bundle_fp32, tmp_path):
    """ownphotos#112, tarindexer#9."""
    photos = make_photos(tmp_path / "photos", ["b.png"])
    odd = os.path.join(os.fsencode(photos), b"caf\xe9.png")
    os.rename(photos / "b.png", odd)
    out, page = tmp_path / "out", tmp_path / "report.html"
    common = ["--bundle", bundle_fp32, "--steps", "1"]
    done = run_restore(photos, "-o", out, "--report", page, "--json", *common)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert os.fsencode(report["output"]) == os.path.join(os.fsencode(out), b"caf\xe9.png")
    assert os.listdir(os.fsencode(out)) == [b"caf\xe9.png"]
    assert "caf" in page.read_text("utf-8")
    done = run_restore(photos, "-o", out, "--overwrite", *common)
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9.png" in done.stdout


def test_one_long_name_stops_no_folder(restore, tmp_path):
    long_name = "x" * 251 + ".png"
    photos = make_photos(tmp_path / "photos", ["b.png", long_name])
    status, out, err = restore(photos)
    assert status == 1
    assert (photos / "b.restored.png").exists()
    assert "2 photos: 1 restored, 1 failed" in out
    assert "the name is too long" in err
    status, _, err = restore(photos / long_name)
    assert status == 1
    assert "the name is too long" in err


def test_what_a_format_cannot_hold_is_told_and_left_out(restore, tmp_path, monkeypatch):
    from PIL import PngImagePlugin

    photos = make_photos(tmp_path / "photos", ["a.png"])
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 100_000)
    Image.open(photos / "a.png").save(photos / "a.png", pnginfo=info)
    status, _, err = restore(photos / "a.png", "-o", tmp_path / "a.jpg")
    assert status == 0
    assert "JPEG cannot hold the text 'workflow'" in err

    def never(*arguments, **changes):
        raise AssertionError("sampled for a result that cannot be written")

    monkeypatch.setattr(Restorer, "restore", never)
    Image.new("RGBA", (64, 64), (1, 2, 3, 4)).save(photos / "glass.png")
    Image.new("RGB", (9000, 8)).save(photos / "wide.png")
    for name, output, message in (
        ("glass.png", "glass.jpg", "cannot hold the photo's transparency"),
        ("wide.png", "wide.webp", "is too large for WebP"),
    ):
        status, _, err = restore(photos / name, "-o", tmp_path / output, "--upscale", "2")
        assert status == 1
        assert message in err


def test_raws_of_a_folder_are_counted(restore, tmp_path):
    photos = make_photos(tmp_path / "photos", ["a.png"])
    (photos / "a.NEF").write_bytes(b"MM\0*")
    status, _, err = restore(photos, "-o", tmp_path / "out")
    assert status == 0
    assert "camera raws in the folders were left out: 1" in err


def test_the_guard_asks_for_memory_and_can_be_lifted(restore, tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos", ["a.png"])
    monkeypatch.setattr(Restorer, "max_photo_pixels", 4000)
    status, _, err = restore(photos, "-o", tmp_path / "out")
    assert status == 1
    assert "is too large" in err
    assert "--any-size" in err
    assert restore(photos, "-o", tmp_path / "out", "--any-size")[0] == 0


def test_names_that_steer_a_terminal_are_printed_as_text(restore, tmp_path):
    photos = make_photos(tmp_path / "photos", ["\x1b[31mred.png", "\u202egnp.png"])
    (photos / "\x1b[2Jnone.png").write_text("no image")
    status, out, err = restore(photos, "-o", tmp_path / "out", "--report", tmp_path / "page.html")
    assert status == 1
    assert r"\x1b[31mred.png  (" in out
    assert r"failed: " + printable(str(photos / "\x1b[2Jnone.png")) in out
    assert not {"\x1b", "\u202e"} & set(out + err.replace("\x1b[A", ""))  # how the bar moves up
