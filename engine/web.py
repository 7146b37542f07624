"""The command `python -m engine.web`; see `engine.page.command`.

It imports nothing heavy by itself, so that Ctrl-C while libraries load ends as it does later.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.cli.console import run_command


def main(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where nothing can be done."""
    from engine.page.command import serve

    return serve(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
