"""What may be skipped where everything has to run: with `CI` set, as `.ci/run` does, any other skip fails the run.

A reason begins with its kind: `pytest.skip("gpu: none here")`. A reason of no kind tells a person what to
install. CI has installed it, so there such a skip means that tests have silently stopped running.
"""

from __future__ import annotations

import os

import pytest

KINDS = (
    "gpu:",  # needs one, another one, or none
    "cpu:",  # needs instructions that this one lacks
    "slow:",  # without --slow
    "full size:",  # without --full-size
)


def reason_of(report) -> str:
    """Return why a test, or a whole file that skipped itself while it was collected, was skipped."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def unexpected(config) -> list[str]:
    """Return what was skipped and may not be, each with its reason."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or not os.environ.get("CI"):  # a worker of pytest-xdist has no terminal; its master has
        return []
    skipped = [(report.nodeid, reason_of(report)) for report in terminal.stats.get("skipped", ())]
    return [f"{test}: {reason}" for test, reason in skipped if not reason.startswith(KINDS)]


def pytest_sessionfinish(session):
    if unexpected(session.config) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if found := unexpected(config):
        terminalreporter.section("skipped though CI must run it", red=True, bold=True)
        for line in found:
            terminalreporter.line(line, red=True)
