"""The command `python -m engine.restore`; see `engine.cli.command`.

It imports nothing heavy by itself, so that Ctrl-C while libraries load ends as it does later.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.cli.console import run_command


def main(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where nothing can be done."""
    from engine.memory.host_memory import check_addresses

    check_addresses()
    from engine.cli.command import restore

    return restore(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
