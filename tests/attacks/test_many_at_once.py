"""Several runs at once, runs that are killed, clocks that are set back: nothing is made twice, lost or left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

pytest.importorskip("onnx", reason="needs the build extra")

from engine import Restorer
from engine.bundle.manifest import open_bundle
from engine.bundle.verification import Trial
from engine.cli.batch import BatchRunner, restore_all
from engine.cli.claims import claim_photo, clean_stale_claims
from engine.cli.console import run_command
from engine.cli.jobs import Placement, find_photos, plan_jobs
from engine.errors import OutputError
from engine.image.files import read_provenance
from engine.pipeline.provenance import provenance_of
from engine.restore import main
from export.build import folder, steps
from export.build.trial import TrialRun

SETTINGS = ["--steps", "1", "--min-size", "64", "--threads", "1"]


@pytest.fixture
def photos(tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return place


@pytest.fixture
def restore(bundle_fp32, capsys):
    """Run the command in this process; returns (status, stdout, stderr)."""

    def call(*arguments):
        status = run_command(main, ["--bundle", str(bundle_fp32), *SETTINGS, *map(str, arguments)])
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def names(place):
    return sorted(path.name for path in place.iterdir())


@pytest.mark.timeout(120)
def test_two_runs_into_one_folder_share_the_work(bundle_fp32, photos, tmp_path):
    """Each photo is restored once, by one of them, and both end well."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "engine.restore", photos, "-o", out, "--bundle", bundle_fp32, *SETTINGS, "--json"]
    runs = [subprocess.Popen([*command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    done = [run.communicate(timeout=100) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], done
    made = [report["output"] for output, _ in done for report in json.loads(output)]
    assert sorted(made) == [str(out / name) for name in names(photos)]
    assert names(out) == names(photos)


class Watch:
    """A progress that nobody watches; `begun` is called when a photo is turned to."""

    def __init__(self, begun=lambda job: None):
        self.begin = begun

    def step(self):
        pass

    def part(self, stage, done, total):
        pass

    def note(self, text, *, detail=False):
        pass


@pytest.fixture
def batch(restorer, photos, tmp_path):
    """Return the jobs and the runner of a run of its own into one folder."""
    settings = restorer.defaults.updated({"steps": 1, "min_size": 64})
    placement = Placement(tmp_path / "out")

    def make():
        work = BatchRunner(restorer, settings)
        jobs = plan_jobs(
            find_photos([photos], placement), placement, 0, lambda seed: provenance_of(restorer.bundle, settings)
        )
        return jobs, work

    return make


def test_a_photo_that_another_run_has_is_waited_for_at_the_end(batch, photos, tmp_path):
    jobs, work = batch()
    (tmp_path / "out").mkdir()
    claim = claim_photo(photos / "0.png", tmp_path / "out")
    assert claim_photo(photos / "0.png", tmp_path / "out") is None
    turned_to = []

    def begun(job):
        turned_to.append(job.photo.name)
        if len(turned_to) == 5:
            threading.Timer(0.5, claim.release).start()

    outcomes = list(restore_all(jobs, work, Watch(begun)))
    assert turned_to == ["1.png", "2.png", "3.png", "4.png", "5.png", "0.png"]
    assert [outcome.error for outcome in outcomes] == [None] * 6
    assert names(tmp_path / "out") == names(photos)


def test_what_another_run_has_made_is_kept(batch, photos, tmp_path):
    jobs, work = batch()
    others, other_work = batch()
    assert all(outcome.reports for outcome in restore_all(others[:3], other_work, Watch()))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    outcomes = list(restore_all(jobs, work, Watch()))
    assert [len(outcome.reports) for outcome in outcomes] == [0, 0, 0, 1, 1, 1]
    assert [outcome.error for outcome in outcomes] == [None] * 6
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before


def test_runs_on_a_disk_without_locks_do_not_call_each_others_results_errors(batch, photos, tmp_path, monkeypatch):
    def unsupported(self, *arguments, **options):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    whole, made = Restorer.restore, []

    def restored(self, photo, **changes):
        result = whole(self, photo, **changes)
        if not made:
            made.append(True)
            others, work = batch()
            assert all(outcome.error is None for outcome in restore_all(others, work, Watch()))
        return result

    monkeypatch.setattr(Restorer, "restore", restored)
    jobs, work = batch()
    assert [outcome.error for outcome in restore_all(jobs, work, Watch())] == [None] * 6
    assert names(tmp_path / "out") == names(photos)


def test_a_run_that_is_stopped_does_not_wait_for_another(batch, photos, tmp_path):
    jobs, work = batch()
    (tmp_path / "out").mkdir()
    claims = [claim_photo(photos / name, tmp_path / "out") for name in names(photos)[1:]]
    running = restore_all(jobs, work, Watch())

    def stop(job):
        raise KeyboardInterrupt

    running = restore_all(jobs, work, Watch(stop))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(running)
    assert time.monotonic() - started < 10
    for claim in claims:
        claim.release()
    assert [name for name in names(tmp_path / "out") if name.startswith(".")] == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as Unix has them")
def test_claims_of_a_killed_run_are_free_and_are_cleared(photos, tmp_path, restore):
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from engine.cli.claims import claim_photo\n"
        "held = [claim_photo(Path(name), Path(sys.argv[1])) for name in sys.argv[2:]]\n"
        "print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, out, photos / "0.png", photos / "gone.png"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert claim_photo(photos / "0.png", out) is None
        clean_stale_claims(out)
        assert len(names(out)) == 2
        process.send_signal(signal.SIGKILL)
    assert restore(photos, "-o", out)[0] == 0
    assert names(out) == names(photos)


def test_a_photo_from_the_future_is_gone_on_with_until_it_changes(restore, photos, tmp_path):
    """A camera whose clock is wrong, a computer whose clock was set back."""
    out = tmp_path / "out"
    later = time.time() + 1e6
    os.utime(photos / "0.png", (later, later))
    assert restore(photos / "0.png", "-o", out)[0] == 0
    assert restore(photos, "-o", out)[1].splitlines()[-1].startswith("6 photos: 5 restored, 1 had a result already")
    assert read_provenance(out / "0.png")["photo"]["modified_ns"] == (photos / "0.png").stat().st_mtime_ns
    for change in (
        lambda: os.utime(photos / "0.png", (later + 1, later + 1)),
        lambda: (photos / "0.png").write_bytes(b""),
    ):
        change()
        status, _, err = restore(photos, "-o", out)
        assert status == 1
        assert "0.png: exists already" in err


# -- builds that are killed -------------------------------------------------------------------------------


def killed_before(act, partial, output):
    """Swap in a process of its own, which ends before the `act`th step; tell whether it ended so.

    A step is a rename, the removal of a file, or of half of a folder.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = iter(range(act))

    def step(whole):
        def call(*arguments, **options):
            if next(left, None) is None:
                os._exit(9)
            return whole(*arguments, **options)

        return call

    def remove(place, **options):
        files = sorted(place.iterdir()) if place.exists() else []
        for part in (files[: len(files) // 2], files[len(files) // 2 :]):
            step(lambda part=part: [os.unlink(file) for file in part])()
        rmtree(place, **options)

    rmtree = shutil.rmtree
    Path.rename, Path.unlink, folder.shutil.rmtree = step(Path.rename), step(Path.unlink), remove
    status = 1
    try:
        folder.swap(partial, output)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes as Unix has them")
def test_a_swap_that_is_killed_anywhere_is_put_right(tmp_path):
    """Either bundle is in place, whole; the new one can be gone on with where it is not; and nothing else is left."""
    seen = []
    for act in range(20):
        output = tmp_path / f"{act}" / "bundle"
        partial = folder.partial_folder(output)
        for place, names_of_files in ((output, "abc"), (partial, [*"def", folder.STATE])):
            place.mkdir(parents=True)
            for name in names_of_files:
                (place / name).touch()
        killed = killed_before(act, partial, output)
        folder.repair(output)
        if names(output) == ["a", "b", "c"]:
            assert names(partial) == ["d", "e", "f", folder.STATE]
            assert names(output.parent) == [".bundle.building", "bundle"]
        else:
            assert set(names(output)) - {folder.STATE} == {"d", "e", "f"}  # the state goes when the bundle is opened
            assert names(output.parent) == ["bundle"]
        seen.append(names(output)[0])
        if not killed:
            break
    assert "".join(seen) == "aadddd"


class Stop(BaseException):
    """What a kill looks like from inside."""


def test_a_build_that_was_killed_in_its_swap_is_gone_on_with(bundle_fp32, build_bundle, tmp_path, monkeypatch):
    def stop(partial, output):
        output.rename(output.parent / f".{output.name}.old")
        raise Stop

    trial = TrialRun(Trial(method="not run", symbols={}), {}, {})
    monkeypatch.setattr(steps, "try_graph", lambda *_: trial)
    output = shutil.copytree(bundle_fp32, tmp_path / "bundle")
    with monkeypatch.context() as patch:
        patch.setattr(steps, "swap", stop)
        with pytest.raises(Stop):
            build_bundle(output, preset="supir")
    monkeypatch.setattr(steps, "write_weights", None)  # they are there
    build_bundle(output, preset="supir")
    assert open_bundle(output).manifest.preset == "supir"
    assert names(tmp_path) == ["bundle"]
    assert folder.STATE not in names(output)


def test_what_a_killed_build_of_something_else_left_is_cleared(bundle_fp32, build_bundle, tmp_path):
    shutil.copytree(bundle_fp32, tmp_path / "bundle")
    (tmp_path / ".bundle.building").mkdir()
    (tmp_path / ".bundle.building" / folder.STATE).write_text(json.dumps({"key": {"preset": "supir"}}))
    (tmp_path / ".bundle.lock").touch()
    (tmp_path / "bundle" / folder.STATE).touch()  # of one that was killed when its bundle was in place
    before = names(bundle_fp32)
    build_bundle(tmp_path / "bundle")
    assert names(tmp_path) == ["bundle"]
    assert names(tmp_path / "bundle") == before


def test_a_folder_that_is_no_bundle_is_left_alone(build_bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / folder.STATE).write_text("{}")
    with pytest.raises(OutputError, match="something that is no bundle lies there"):
        build_bundle(tmp_path / "mine")
    assert names(tmp_path / "mine") == [folder.STATE]
