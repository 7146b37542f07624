"""Options that commands share: a restoration's settings, names of files, numbers within bounds.

It imports nothing heavy: a client that only talks to a server has the same options.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from engine.settings import Option, ScaleRange, Settings, parse_scale


def command_parser(prog: str, description: str | None, *, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a command's parser: options by their whole names only, texts with their lines as they are written.

    Args:
        prog: how the command is called, such as "python -m engine.restore".
        description: what it does, usually the module's docstring.
        epilog: what stands below the options.
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given on a command line, by name; the others are the bundle's."""
    given = {name: value for name in Settings.model_fields if (value := getattr(options, name)) is not None}
    switched_off = {name: None for name in Settings.model_fields if getattr(options, f"no_{name}", False)}
    return given | switched_off


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of `Settings`, and another that switches it off where it may be None."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in Settings.model_fields.items():
        option = option_of(field)
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        group: argparse._ActionsContainer = groups[option.group]
        kinds = get_args(field.annotation)
        if NoneType in kinds:
            group = groups[option.group].add_mutually_exclusive_group()
        flag = name.replace("_", "-")
        told = f'{field.description}; default: "{field.default}"' if option.tells_default else field.description
        if get_origin(field.annotation) is Literal:
            group.add_argument(f"--{flag}", choices=kinds, help=told)
        else:
            group.add_argument(f"--{flag}", type=parser_of(name), metavar=option.metavar, help=told)
        if NoneType in kinds:
            group.add_argument(f"--no-{flag}", action="store_true", help="off, where the bundle has it on")


def option_of(field: FieldInfo) -> Option:
    """Return how a setting is shown."""
    return next(entry for entry in field.metadata if isinstance(entry, Option))


def parser_of(name: str) -> Callable[[str], Any]:
    """Return the function from a setting's text on a command line to its value.

    What it raises is ValueError, or argparse.ArgumentTypeError with a sentence.
    """
    annotation = Settings.model_fields[name].annotation
    kinds: tuple[Any, ...] = (*get_args(annotation), annotation)
    return _PARSERS.get(name) or next(kind for kind in kinds if callable(kind))


def path_option(text: str) -> Path:
    """Return a file's or folder's name; an empty one is refused."""
    if not text:  # which Path would take for the current folder
        raise argparse.ArgumentTypeError("expected a name, got an empty one")
    return Path(text)


def whole_number(low: int, high: int, meaning: str = "") -> Callable[[str], int]:
    """Return the parser of a whole number from `low`, which means `meaning`, to `high`."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected {low}{meaning} to {high}, got {text!r}")
        return int(text)

    return number


def _tile(text: str) -> int | str:
    if text in ("auto", "off"):
        return text
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected auto, off, or a tile's side in pixels, got {text!r}")


def _scale(text: str) -> ScaleRange:
    try:
        return parse_scale(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected S or S:END, such as 2 or 4:1, got {text!r}") from None


#: Settings whose values are written in another way than Python's.
_PARSERS: dict[str, Callable[[str], Any]] = {"tile": _tile, "cfg_scale": _scale, "control_scale": _scale}


def gibibytes(text: str) -> float:
    """Return an amount of memory in GiB."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100_000:
        raise argparse.ArgumentTypeError(f"expected gibibytes such as 8 or 7.5, got {text!r}")
    return value
