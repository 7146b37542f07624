"""`python -m benchmarks.compare`; see `benchmarks.compare.command`."""

import sys

from engine.cli.console import run_command
from engine.cli.main import dispatch

if __name__ == "__main__":
    sys.exit(run_command(lambda arguments: dispatch(["compare", *arguments])))
