"""`python -m benchmarks.compare`; see `benchmarks.compare.command`."""

import sys

from benchmarks.compare.command import main
from engine.cli.console import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
