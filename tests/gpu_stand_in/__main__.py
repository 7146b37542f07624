"""Run scenarios as `pytest` does: `python tests/gpu_stand_in [FILES AND OPTIONS OF PYTEST]`."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT = (str(HERE / "scenarios"), str(HERE.parent / "gpu"))


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs pytest on the stand-in, and its environment."""
    named = any((HERE.parent.parent / each.split("::")[0]).exists() for each in arguments if not each.startswith("-"))
    chosen = arguments if named else (*DEFAULT, *arguments)
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    line = [sys.executable, "-m", "pytest", "-p", "gpu_stand_in.plugin", "-p", "no:cacheprovider", *chosen]
    return line, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    line, environment = command(*sys.argv[1:])
    sys.exit(subprocess.run(line, env=environment, check=False).returncode)
