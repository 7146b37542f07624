"""Errors that the user can mend: where, what was expected, what was found, what to do.

Every error that the project raises on purpose is a `RestoreError`. Its text stands on its own: it
names the place, so no traceback is needed to understand it. Anything else that escapes is a bug.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Literal


class RestoreError(Exception):
    """An error with its place, the expectation, the finding and the remedy.

    Args:
        problem: one sentence, lower case, no full stop: what is wrong.
        where: the file, tensor, option or graph that it concerns.
        expected: what would have been right.
        found: what was there instead.
        fix: what the user can do about it.
    """

    #: Exit status of a command that ends with this error.
    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem = problem
        # Names and contents are strangers': what they hold must not steer a terminal.
        self.where = None if where is None else printable(str(where))
        self.expected = None if expected is None else printable(str(expected))
        self.found = None if found is None else printable(str(found))
        self.fix = fix
        super().__init__(str(self))

    def at(self, place: object) -> RestoreError:
        """Return this error with a place before its own."""
        where = f"{place}: {self.where}" if self.where else place
        return type(self)(self.problem, where=where, expected=self.expected, found=self.found, fix=self.fix)

    def __str__(self) -> str:
        head = f"{self.where}: {self.problem}" if self.where else self.problem
        details = [
            f"  {label:<9} {text}"
            for label, text in (
                ("expected:", self.expected),
                ("found:", self.found),
                ("to do:", self.fix),
            )
            if text
        ]
        return "\n".join([head, *details])


def printable(text: str) -> str:
    """Return a text with what steers a terminal, or the direction of writing, as an escape; lines stay."""
    if text.isprintable():
        return text
    plain = (letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in text)
    return "".join(plain)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


class UsageError(RestoreError):
    """The command line or the arguments of a call make no sense."""

    exit_code = 2


class ScheduleError(RestoreError):
    """A noise schedule, a number of steps or a table of step weights is impossible."""


class CheckpointError(RestoreError):
    """A checkpoint is missing, damaged, of another model, or does not cover the networks."""


class LoraError(RestoreError):
    """A LoRA is damaged, of an unsupported kind, or does not fit the base."""


class BuildError(RestoreError):
    """A bundle could not be built."""


class BundleError(RestoreError):
    """A bundle is incomplete, changed, or of another version."""


class BackendError(RestoreError):
    """A backend is missing, cannot run a graph, or was called with wrong tensors."""


class OutOfMemoryError(BackendError):
    """A computer or a GPU has less memory left than was asked for: less at a time may help.

    Backends raise it whatever their libraries raise, log or return, so that it can be told from other failures.
    """


class DoesNotFitError(BackendError):
    """A size that memory does not hold, or that a plan was not compiled for; a smaller one may fit."""


class ImageError(RestoreError):
    """An image cannot be read or is of a kind that is not restored."""


class InputError(RestoreError):
    """A file or folder cannot be read."""


class OutputError(RestoreError):
    """A result cannot be written."""


class UnexpectedError(RestoreError):
    """A bug, met while one of many photos was restored."""

    exit_code = 70


#: What one may be doing with a file or folder: then the same error has another remedy.
Access = Literal["read", "write", "either"]


def from_os_error(error: OSError, path: object, action: str, access: Access = "write") -> RestoreError:
    """Translate an operating-system error about `path`: an `InputError` where it was read, else an `OutputError`.

    Args:
        error: as caught.
        path: the file or folder.
        action: what was being done, as in "write the image".
        access: whether the path was being read or written; "either" where the caller does not know.
    """
    number = error.errno or 0
    default = (os.strerror(number) if number else str(error), None)
    reason, fix = {**_REASONS, **_REASONS_BY_ACCESS[access]}.get(number, default)
    kind = InputError if access == "read" else OutputError
    return kind(f"cannot {action}: {reason}", where=path, fix=fix)


_FREE_SPACE = "free some space or choose another disk"
_WRITABLE = "choose a place that you may write to"
_REASONS = {
    errno.ENOSPC: ("the disk is full", _FREE_SPACE),
    errno.EDQUOT: ("the disk quota is used up", _FREE_SPACE),
    errno.EFBIG: ("the file is too large for this disk or limit", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", _WRITABLE),
    errno.ENOTDIR: ("a part of the path is not a folder", "correct the path"),
    errno.EISDIR: ("it is a folder", "name a file"),
    errno.EEXIST: ("something else has that name", "choose another name"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
}
_GONE = ("no such file or folder", "check the path: it may have been moved or removed meanwhile")
_REASONS_BY_ACCESS: dict[Access, dict[int, tuple[str, str]]] = {
    "read": {
        errno.EACCES: ("no permission", "allow this user to read it, and to enter its folders"),
        errno.EPERM: ("not permitted", "allow this user to read it, and to enter its folders"),
        errno.ENOENT: _GONE,
    },
    "write": {
        errno.EACCES: ("no permission", _WRITABLE),
        errno.EPERM: ("not permitted", _WRITABLE),
        errno.ENOENT: ("no such folder", "create it first"),
    },
    "either": {
        errno.EACCES: ("no permission", "check who may read and write it"),
        errno.EPERM: ("not permitted", "check who may read and write it"),
        errno.ENOENT: _GONE,
    },
}


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, which is enough to know it by."""
    return str(error).strip().split("\n")[0][:300]


def close_all(*closes: Callable[[], object]) -> None:
    """Call each, whatever those before it raise; the first error is raised in the end."""
    first: Exception | None = None
    for close in closes:
        try:
            close()
        except Exception as error:
            first = first or error
    if first is not None:
        raise first


def close_after(error: BaseException | None, *closes: Callable[[], object]) -> None:
    """Call each, as `close_all`; where an error is on its way, it is the one that is told: it came first.

    Args:
        error: that is on its way, None if there is none.
        closes: functions that give something back.
    """
    try:
        close_all(*closes)
    except Exception:
        if error is None:
            raise
