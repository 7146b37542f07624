"""A hash of code by what it says: comments, docstrings, formatting and the places of our own modules do not count.

The same for every version of Python that the project supports, so that a key can be shipped.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TypeGuard

_WITH_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
#: Follows from where an expression stands, or is a comment.
_REDUNDANT = ("ctx", "kind", "type_comment")
#: Packages whose modules may move: of an import from them, only the names count.
_OUR_PACKAGES = ("engine", "export")


def code_key(files: Iterable[Path]) -> str:
    """Return a hash of some modules' code, in hexadecimal; the order of the files counts, their places do not.

    Args:
        files: Python sources.
    Raises:
        OSError: one cannot be read. SyntaxError: it is not Python.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(_file_key(file).encode())
    return digest.hexdigest()


@lru_cache
def _file_key(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()


def _is_import_of_ours(statement: ast.AST) -> TypeGuard[ast.ImportFrom]:
    return isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] in _OUR_PACKAGES


def _plain(value: object) -> object:
    """Return a syntax tree as lists of strings.

    `ast.dump` would differ between versions of Python, which add fields that are empty in older code.
    """
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = dict(ast.iter_fields(value))
    if isinstance(value, _WITH_DOCSTRINGS) and ast.get_docstring(value, clean=False) is not None:
        fields["body"] = value.body[1:]
    if isinstance(value, ast.Module):
        ours = [each for each in fields["body"] if _is_import_of_ours(each)]
        names = {(name.name, name.asname or name.name) for each in ours for name in each.names}
        fields["body"] = [sorted(names), *(each for each in fields["body"] if each not in ours)]
    present = [
        (name, _plain(each)) for name, each in fields.items() if name not in _REDUNDANT and each not in (None, [])
    ]
    return [type(value).__name__, *present]
