"""The command `python export/train_lora.py`; see `export.training.command`.

It imports nothing heavy by itself, so that Ctrl-C while libraries load ends as it does later.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.cli.console import run_command


def main(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where it fails."""
    from export.training.command import train

    return train(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
