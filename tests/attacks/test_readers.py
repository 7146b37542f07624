"""Every reader of foreign bytes, fuzzed: a bounded, seeded part here, the long one by `make attack`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest

pytest.importorskip("onnx", reason="needs the build extra")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes as Unix has them")

HARNESS = Path(harness.__file__)


def fuzz(bundle, inputs, timeout):
    command = [sys.executable, str(HARNESS), str(bundle), "--inputs", str(inputs), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.stdout, done.stderr
    return [harness.Row(**row) for row in json.loads(done.stdout)]


@pytest.mark.parametrize("inputs", [600, pytest.param(200_000, marks=[pytest.mark.slow, pytest.mark.timeout(10_000)])])
def test_whatever_the_bytes_a_reader_reads_or_refuses_them(bundle_fp32, inputs):
    """In bounded time and memory, and the process lives."""
    rows = fuzz(bundle_fp32, inputs, max(120, inputs // 20))
    assert [row for row in rows if row.is_bad] == []
    assert sum(row.inputs for row in rows) >= inputs
    assert len(rows) > 30
    for row in rows:
        assert row.accepted + row.refused == row.inputs
        assert row.refused > 0 or row.reader == "state of a build", row  # which a damaged state lets begin anew


def reader(read):
    return SimpleNamespace(name="test", example=lambda: b"{}", wrap=bytes, read=read)


def on_second(act):
    """Read the good example, and do something at the first changed one."""
    seen = []

    def read(data, folder):
        seen.append(data)
        if len(seen) > 1:
            act()

    return reader(read)


ENDS = {
    "a bug": (lambda: {}["x"], "input 0: KeyError at test_readers.py:"),
    "a kill": (lambda: os.kill(os.getpid(), 9), "ended by -9 at input 0"),
    "a hang": (lambda: time.sleep(60), "ended by -14 at input 0"),
    "an exit": (lambda: os._exit(0), "ended by 0 at input 0"),
}


@pytest.mark.parametrize(("act", "problem"), ENDS.values(), ids=ENDS)
def test_the_harness_tells_what_goes_wrong(monkeypatch, act, problem):
    if "-14" in problem:
        monkeypatch.setattr(harness, "MOST_SECONDS", 4)
    row = harness.attack(on_second(act), range(3), seed=1)
    assert row.is_bad
    assert row.problem.startswith(problem)


def test_the_harness_tells_what_takes_memory():
    row = harness.attack(on_second(lambda: b"x" * (harness.MOST_BYTES + (50 << 20))), range(2), seed=1)
    assert (row.problem, row.exit_code) == (None, 0)
    assert row.is_bad


def test_the_harness_tells_an_example_that_is_not_read():
    assert "the good example: ZeroDivisionError" in harness.attack(reader(lambda *_: 1 / 0), range(2), seed=1).problem
