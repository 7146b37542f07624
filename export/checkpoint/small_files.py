"""Small files beside tensors, as configurations, indexes and vocabularies: bounded, and told where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.bundle.files import read_bounded
from engine.errors import BundleError, CheckpointError, first_line


def read_small_text(path: Path) -> str:
    """Return a small file's text.

    Raises:
        CheckpointError: missing, too large, no plain file, or not UTF-8.
    """
    try:
        return read_bounded(path).decode()
    except BundleError as error:
        raise CheckpointError(error.problem, where=error.where, expected=error.expected, found=error.found) from error
    except OSError as error:
        raise CheckpointError("cannot be read", where=path, found=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise CheckpointError("is no text in UTF-8", where=path, found=first_line(error)) from error


def parse_object(text: str, problem: str, where: object, expected: str) -> dict[str, Any]:
    """Return an object of JSON.

    Args:
        text: of it.
        problem, where, expected: for the error.
    Raises:
        CheckpointError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        found = first_line(error)
    else:
        if isinstance(value, dict):
            return value
        found = type(value).__name__
    raise CheckpointError(problem, where=where, expected=expected, found=found, fix="download or save it again")


def read_object(path: Path, problem: str, expected: str) -> dict[str, Any]:
    """Return the object of JSON in a small file.

    Args:
        path: of the file.
        problem, expected: for the error where it holds none.
    Raises:
        CheckpointError: as `read_small_text`, or no object of JSON.
    """
    return parse_object(read_small_text(path), problem, path, expected)
