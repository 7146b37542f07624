"""Run scenarios as `pytest` does: `python tests/gpu_stand_in [FILES AND OPTIONS OF PYTEST]`.

Without files: all scenarios and tests/gpu, each file in a process of its own, as some need, and what they came to.
"""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT = (*sorted((HERE / "scenarios").glob("test_*.py")), *sorted((HERE.parent / "gpu").glob("test_*.py")))
#: What a scenario prints of the calls that it had fail.
_FAILED = re.compile(r"(\d+) calls of \d+ functions failed")


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs pytest on the stand-in, and its environment."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    line = [sys.executable, "-m", "pytest", "-p", "gpu_stand_in.plugin", "-p", "no:cacheprovider", *arguments]
    return line, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def names_files(arguments: list[str]) -> bool:
    """Tell whether arguments of pytest say which files to run."""
    return any((HERE.parent.parent / each.split("::")[0]).exists() for each in arguments if not each.startswith("-"))


def run_all(arguments: list[str]) -> int:
    """Run each file in a process of its own, print what it says, and then the sum; returns the exit status."""
    started, outcomes, calls, status = time.monotonic(), Counter[str](), 0, 0
    for file in DEFAULT:
        line, environment = command(str(file), "-rA", *arguments)
        done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, flush=True)
        calls += sum(map(int, _FAILED.findall(done.stdout)))
        summary = (done.stdout.strip().splitlines() or [""])[-1]
        outcomes.update({kind: int(count) for count, kind in re.findall(r"(\d+) (\w+)", summary.split(" in ")[0])})
        nothing_to_run = done.returncode == 5  # such as -k names none of a file
        status = status or (0 if nothing_to_run else done.returncode)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items()))
    print(f"all files: {told}; {calls} calls made to fail; {time.monotonic() - started:.0f} s")
    return status


if __name__ == "__main__":
    given = sys.argv[1:]
    if not names_files(given):
        sys.exit(run_all(given))
    line, environment = command(*given)
    sys.exit(subprocess.run(line, env=environment, check=False).returncode)
