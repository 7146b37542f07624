"""Everything that only a GPU can show, in one run: the tests in tests/gpu, with their numbers.

    python benchmarks/gpu_session.py                      where a GPU is at hand
    python benchmarks/gpu_session.py --tests -k parity    with options for pytest

It writes the GPU, the driver, the libraries, the date, and of each test the outcome, the reason of a skip
or failure, its seconds and the numbers that it recorded, into benchmarks/results/, and ends with all of that as
a page in Markdown, to be pasted into an issue.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_device, describe_machine
from engine.bundle.storage import plain_name
from engine.cli.console import run_command
from engine.cli.options import command_parser
from engine.device.cuda import CudaDevice
from engine.errors import UsageError

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("tensorrt", "tensorrt-rtx", "onnxruntime-gpu", "cuda-python", "cuda-core", "nvidia-cuda-nvrtc")


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Raises:
        BackendError: there is no GPU.
        UsageError: pytest is not installed, or found no tests.
    """
    options = _parser().parse_args(arguments)
    gpu = describe_gpu()  # before anything is built for it
    tests, status = run_tests([str(_ROOT / "tests" / "gpu"), *options.tests])
    machine, counts = describe_machine(), summary(tests)
    report = {"machine": machine, "gpu": gpu, "summary": counts, "tests": tests}
    name = f"gpu-{plain_name(gpu['name'])}-{machine['date']}.json"
    file = options.json or _ROOT / "benchmarks" / "results" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    text = page(report)
    file.with_suffix(".md").write_text(text)
    print(text)
    print(f"written: {file} and, to be pasted into an issue, {file.with_suffix('.md')}: the text above")
    return status


def page(report: dict[str, Any]) -> str:
    """Return a report as Markdown, to be pasted into an issue: what ran, what failed, figures, versions."""
    machine, gpu, tests = report["machine"], report["gpu"], report["tests"]
    lines = [
        f"# GPU session: {gpu['name']}, {machine['date']}",
        "",
        ", ".join(f"{count} {outcome}" for outcome, count in report["summary"].items()),
        "",
        "| what | is |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in gpu.items() if key != "versions"),
        *(f"| {key} | {machine[key]} |" for key in ("processor", "memory_gib", "system", "python", "command")),
    ]
    versions = {**machine["versions"], **gpu["versions"]}
    installed = [f"{package} {version}" for package, version in versions.items() if version != "not installed"]
    lines += [f"| versions | {', '.join(sorted(installed))} |", ""]
    for outcome in sorted({test["outcome"] for test in tests} - {"passed"}):
        lines += [f"## {outcome.capitalize()}", ""]
        lines += [
            f"- `{_name(test)}`: {' '.join(test['reason'].split())[:300]}"
            for test in tests
            if test["outcome"] == outcome
        ]
        lines.append("")
    lines += ["## All tests", "", "| test | outcome | s | figures |", "|---|---|---|---|"]
    for test in tests:
        figures = ", ".join(f"{name} {_told(value)}" for name, value in test["numbers"].items())
        lines.append(f"| `{_name(test)}` | {test['outcome']} | {test['seconds']:.1f} | {figures} |")
    return "\n".join([*lines, ""])


def _name(test: dict[str, Any]) -> str:
    return str(test["test"]).rpartition("::")[2].replace("|", "/")


def _told(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def describe_gpu() -> dict[str, Any]:
    """Return what the GPU, its driver and its libraries are.

    Raises:
        BackendError: there is none.
    """
    with CudaDevice(0) as device:
        found = describe_device(device)
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**found, "versions": versions}


def run_tests(arguments: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Run pytest here and return what became of each test, and the exit status.

    Args:
        arguments: for pytest.
    Raises:
        UsageError: it is not installed, or found no tests.
    """
    try:
        import pytest
    except ModuleNotFoundError as error:
        raise UsageError(
            "this runs tests, and pytest is not installed", fix="pip install -e '.[export,test]'"
        ) from error
    notes = _Notes()
    status = int(pytest.main(["-rsA", *arguments], plugins=[notes]))
    if not notes.tests:
        raise UsageError("no tests were run", where="--tests", found=" ".join(arguments))
    return list(notes.tests.values()), status


def summary(tests: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Count the outcomes."""
    counts: dict[str, int] = {}
    for test in tests:
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    return dict(sorted(counts.items()))


class _Notes:
    """A plugin of pytest that keeps what tests recorded."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take one of a test's three phases; the first that does not pass is its outcome."""
        test = self.tests.setdefault(
            report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0, "numbers": {}}
        )
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.when in ("call", "teardown"):
            test["numbers"] = dict(report.user_properties)
        if report.outcome != "passed" and test["outcome"] == "passed":
            expected = hasattr(report, "wasxfail")
            test["outcome"] = "expected failure" if expected else report.outcome
            test["reason"] = report.wasxfail if expected else _reason(report)


def _reason(report: Any) -> str:
    """Return the last line of why a test was skipped or failed."""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr).strip()[:1000]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python benchmarks/gpu_session.py", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/gpu-NAME-DATE.json")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=[], help="options for pytest, such as -k memory")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
