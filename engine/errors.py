"""Errors that the user can mend: where, what was expected, what was found, what to do.

Every error that the project raises on purpose is a `RestoreError`. Its text stands on its own: it
names the place, so no traceback is needed to understand it. Anything else that escapes is a bug.
"""

from __future__ import annotations

import errno
import os


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
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
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


class ImageError(RestoreError):
    """An image cannot be read or is of a kind that is not restored."""


class OutputError(RestoreError):
    """A result cannot be written."""


class UnexpectedError(RestoreError):
    """A bug, met while one of many photos was restored."""

    exit_code = 70


def from_os_error(error: OSError, path: object, action: str) -> RestoreError:
    """Translate an operating-system error about `path` into an `OutputError`.

    Args:
        error: as caught.
        path: the file or folder that was being written.
        action: what was being done, as in "write the image".
    """
    reasons = {
        errno.ENOSPC: ("the disk is full", "free some space or choose another disk"),
        errno.EDQUOT: ("the disk quota is used up", "free some space or choose another disk"),
        errno.EFBIG: ("the file is too large for this disk or limit", "raise the limit (ulimit -f)"),
        errno.EACCES: ("no permission", "choose a place that you may write to"),
        errno.EPERM: ("not permitted", "choose a place that you may write to"),
        errno.EROFS: ("the file system is read-only", "choose a place that you may write to"),
        errno.ENOENT: ("no such folder", "create it first"),
        errno.ENOTDIR: ("a part of the path is not a folder", "correct the path"),
        errno.EISDIR: ("it is a folder", "name a file"),
        errno.EEXIST: ("something else has that name", "choose another name"),
        errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    }
    default = (os.strerror(error.errno) if error.errno else str(error), None)
    reason, fix = reasons.get(error.errno or 0, default)
    return OutputError(f"cannot {action}: {reason}", where=path, fix=fix)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, which is enough to know it by."""
    return str(error).strip().split("\n")[0][:300]
