"""The command `restoration-engine`: one name for the project's commands.

Each command is also a module path (`python -m engine.restore`). Modules are named here as text and
imported when their command runs, so the engine does not depend on export, serving or benchmarks.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.cli.console import run_command
from engine.errors import RestoreError, UsageError

PROGRAM = "restoration-engine"


@dataclass(frozen=True)
class Command:
    """A command of the console program.

    Attributes:
        module: its module, which has `main(arguments)`.
        summary: one line for the list of commands.
        extra: the optional dependencies that it needs, as `pip install 'restoration-engine[extra]'` names them.
    """

    module: str
    summary: str
    extra: str | None = None


COMMANDS = {
    "restore": Command("engine.restore", "restore photos with a bundle"),
    "web": Command("engine.web", "open a page to restore photos on, in a browser", "web"),
    "build": Command("export.build_engines", "build a bundle from checkpoints and LoRAs", "build"),
    "train": Command("export.train_lora", "train a LoRA for a checkpoint on a folder of pictures", "train"),
    "serve": Command("triton_repo.serve", "serve a bundle with Triton Inference Server", "triton"),
    "render": Command("triton_repo.render", "write a model repository for Triton", "triton"),
    "client": Command("triton_repo.client", "restore a photo through a server", "triton"),
    "compare": Command("benchmarks.compare.command", "find the layer where two ways of computing differ", "compare"),
}
BENCHMARKS = {
    "latency": Command("benchmarks.latency", "time by stage, against PyTorch and the device's floor", "benchmark"),
    "serving": Command("benchmarks.serving", "what serving costs against direct calls", "triton"),
    "quality": Command("benchmarks.quality", "how like the truth restored photos are, and how sharp", "quality"),
    "seams": Command("benchmarks.seams", "what tiles change against the whole photo", "benchmark"),
    "faces": Command("benchmarks.faces", "what face detectors find, and take for a face", "benchmark,faces"),
    "scaling": Command("benchmarks.scaling", "time and memory over a photo's size", "benchmark"),
    "soak": Command("benchmarks.soak", "a server among faults: answers, restarts, memory", "triton"),
    "gpu": Command("benchmarks.gpu_session", "every check that needs a GPU", "test"),
}

_HELP = f"""usage: {PROGRAM} COMMAND …

commands:
{{commands}}
  benchmark  measure: {", ".join(BENCHMARKS)}
  report     print a latency benchmark's JSON file as Markdown tables

`{PROGRAM} COMMAND --help` lists the options of a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; see `engine.cli.console.run_command`."""
    return run_command(dispatch, arguments)


def dispatch(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names with the others.

    Raises:
        UsageError: there is no such command.
        RestoreError: the command's package or a library is not installed, or the command fails.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", ())
    if name in ("-h", "--help"):
        print(_HELP.format(commands=_listed(COMMANDS)))
        return 0
    if name == "report":
        return _report(rest)
    if name == "benchmark":
        return _benchmark(rest)
    if name not in COMMANDS:
        raise UsageError("no such command", where=name, expected=", ".join([*COMMANDS, "benchmark", "report"]))
    return _run(name, COMMANDS[name], rest)


def _benchmark(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} benchmark NAME …\n\nbenchmarks:\n{_listed(BENCHMARKS)}")
        return 0
    name = arguments[0]
    if name not in BENCHMARKS:
        raise UsageError("no such benchmark", where=name, expected=", ".join(BENCHMARKS))
    return _run(f"benchmark {name}", BENCHMARKS[name], arguments[1:])


def _report(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} report FILE.json\n\nFILE.json is what `benchmark latency --json` has written.")
        return 0 if arguments and arguments[0] in ("-h", "--help") else UsageError.exit_code
    to_markdown = _load("report", Command("benchmarks.report", ""), "to_markdown")
    file = Path(arguments[0])
    try:
        print(to_markdown(json.loads(file.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        raise UsageError("no such file", where=file, fix="check the path") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "not a latency report", where=file, expected="a file that benchmark latency --json has written"
        ) from error
    return 0


def _run(name: str, command: Command, arguments: Sequence[str]) -> int:
    run = _load(name, command, "main")
    sys.argv[0] = f"{PROGRAM} {name}"  # for parsers that take their program's name from there
    return int(run(arguments))


def _load(name: str, command: Command, function: str) -> Callable[..., int]:
    """Return a function of a command's module.

    Raises:
        RestoreError: the module's package, or a library that it needs, is not installed.
    """
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        package = command.module.partition(".")[0]
        missing = error.name or ""
        if missing.startswith(f"{package}.") or (missing == package and package == "engine"):
            raise  # a package that lacks a module of its own is a bug
        fix = f"pip install 'restoration-engine[{command.extra}]'" if command.extra else "install the whole project"
        if missing == package:
            fix = f"install the whole project: this installation lacks the package {package}"
        raise RestoreError(
            "the command is not installed here", where=f"{PROGRAM} {name}", found=f"no module {missing}", fix=fix
        ) from error
    loaded: Callable[..., int] = getattr(module, function)
    return loaded


def _listed(commands: dict[str, Command]) -> str:
    return "\n".join(f"  {name:<9}  {command.summary}" for name, command in commands.items())


if __name__ == "__main__":
    sys.exit(main())
