"""What commands have in common: exit codes, and messages without a traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from engine.errors import OutOfMemoryError, RestoreError, from_os_error

#: What a loader and Python say where a process may not have more: ImportError and RuntimeError.
_LACK_OF_MEMORY = ("failed to map segment", "cannot allocate memory", "can't start new thread")
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
    with _interrupts() as interrupted:
        return _run(main, sys.argv[1:] if arguments is None else arguments, interrupted)


def _run(main: Callable[[Sequence[str]], int], arguments: Sequence[str], interrupted: threading.Event) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # for names that are not UTF-8; standard error does so anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main(arguments)
        sys.stdout.flush()  # here, where a full disk can still be told
        return status
    except RestoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except MemoryError:
        return _out_of_memory()
    except BrokenPipeError:
        _drop_output()
        return RestoreError.exit_code
    except OSError as error:
        # The machine's, not a bug: a full disk, a name too long, a missing permission.
        place = error.filename if error.filename is not None else "the output"
        print(f"error: {from_os_error(error, place, 'read or write', 'either')}", file=sys.stderr)
        _drop_output()
        return RestoreError.exit_code
    except Exception as error:
        # NumPy, while it loads, makes an ImportError of a KeyboardInterrupt.
        if interrupted.is_set():
            print("\ninterrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        if any(text in str(error) for text in _LACK_OF_MEMORY):
            return _out_of_memory()
        traceback.print_exc()
        print("\nThis is a bug. Please report the lines above and the command.", file=sys.stderr)
        return EXIT_BUG


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets before it raises KeyboardInterrupt as usual."""
    interrupted = threading.Event()
    usual = signal.getsignal(signal.SIGINT)
    # Only the main thread may set handlers; a handler that a caller has set stays.
    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield interrupted
        return

    def note_and_raise(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note_and_raise)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)


def _out_of_memory() -> int:
    fix = "close other programs, raise a limit on memory, if one is set, or restore at a smaller size"
    print(f"error: {OutOfMemoryError('out of memory', fix=fix)}", file=sys.stderr)
    return OutOfMemoryError.exit_code


def _drop_output() -> None:
    """Send what standard output cannot write nowhere, or the interpreter complains at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
