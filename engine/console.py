"""What commands have in common: exit codes, messages without traceback, sizes in words."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from engine.errors import RestoreError

EXIT_BUG = 70
EXIT_INTERRUPTED = 130


def run_command(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done. 1: an error that the user can mend, told without a traceback. 2: wrong usage. 70: a bug,
    told with its traceback. 130: interrupted.

    Args:
        main: takes the arguments and returns the status.
        arguments: None means the command line's.
    """
    try:
        return main(sys.argv[1:] if arguments is None else arguments)
    except RestoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except MemoryError:
        print("error: out of memory\n  to do:    close other programs, or work at a smaller size", file=sys.stderr)
        return RestoreError.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # or the interpreter complains while it shuts down
        return 1
    except Exception:
        traceback.print_exc()
        print("\nThis is a bug. Please report the lines above and the command.", file=sys.stderr)
        return EXIT_BUG


def format_bytes(count: int) -> str:
    """Return a size as a person reads it, such as "6.9 GB" or "12 kB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def peak_memory_bytes() -> int | None:
    """Return the most memory that this process has held, None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
