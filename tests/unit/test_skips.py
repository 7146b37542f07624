"""In CI, a test that is skipped for want of something fails the run; pytest runs in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

def test_passes():
    pass

def test_needs_a_gpu():
    pytest.skip("gpu: none here")

@pytest.mark.skip(reason="slow: run with --slow")
def test_is_slow():
    pass
"""
SKIPS = {
    "in a test": "import pytest\ndef test_it():\n    pytest.skip('needs a browser')",
    "by a mark": "import pytest\n@pytest.mark.skipif(True, reason='needs a browser')\ndef test_it():\n    pass",
    "in a fixture": (
        "import pytest\n@pytest.fixture\ndef browser():\n    pytest.importorskip('no_such', reason='needs a browser')\n"
        "def test_it(browser):\n    pass"
    ),
    "as a whole file": (
        "import pytest\npytest.importorskip('no_such', reason='needs a browser')\ndef test_it():\n    pass"
    ),
}


def run(folder, *options, **environment):
    """Run the tests of a folder with the plugin, and without this run's own environment for pytest."""
    kept = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST_")}
    kept["PYTHONPATH"] = str(Path(__file__).parent.parent)
    kept["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half of the time that pytest takes to start
    command = [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    return subprocess.run(
        [*command, *options, str(folder)],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write(folder, *names):
    for number, name in enumerate(names):
        (folder / f"test_{number}.py").write_text(SKIPS[name])
    (folder / "test_good.py").write_text(TESTS)


def told_of(done):
    return done.stdout.partition("skipped though CI must run it")[2]


def test_what_may_be_skipped_is(tmp_path):
    write(tmp_path)
    done = run(tmp_path, CI="1")
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert told_of(done) == ""


def test_any_other_skip_fails_in_ci_and_only_there(tmp_path):
    write(tmp_path, *SKIPS)
    done = run(tmp_path, CI="1")
    assert done.returncode == 1, done.stdout
    for number in range(len(SKIPS)):
        assert f"test_{number}.py" in told_of(done)
    assert told_of(done).count(": needs a browser") == len(SKIPS)
    assert "test_good.py" not in told_of(done)
    assert run(tmp_path).returncode == 0


def test_skips_of_workers_are_counted(tmp_path):
    pytest.importorskip("xdist", reason="needs the test extra")
    write(tmp_path, "in a test", "as a whole file")
    done = run(tmp_path, "-p", "xdist.plugin", "-n", "2", CI="1")
    assert done.returncode == 1, done.stdout
    assert told_of(done).count(": needs a browser") == 2
