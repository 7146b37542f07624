"""Puts the stand-in into a process of pytest: `-p gpu_stand_in.plugin`, with `tests` on the path."""

from __future__ import annotations

import gc

import pytest

from gpu_stand_in import build

if reason := build.missing():
    pytest.exit(f"the stand-in for NVIDIA's driver {reason}", returncode=pytest.ExitCode.USAGE_ERROR)

from gpu_stand_in.install import install

install()

from gpu_stand_in import driver, played_tensorrt, work


@pytest.fixture(autouse=True, scope="session")
def _compile_for_the_stand_in():
    """Compile plans for the stand-in."""
    plans = pytest.importorskip("export.trt.compile", reason="needs the export extra")
    plans._Compiler.compile = played_tensorrt.compile_plan
    plans.inspect_plan = lambda library, path: {}
    init = plans._Compiler.__init__

    def keep_folder(self, library, spec, folder):
        init(self, library, spec, folder)
        self._folder = folder

    plans._Compiler.__init__ = keep_folder


@pytest.fixture(autouse=True)
def _no_rule_is_broken():
    """Fail a test in which a rule of the driver's or a library's documentation was broken."""
    driver.order("lazy")
    driver.broken()
    work.BROKEN.clear()
    work.CALLS.clear()
    yield
    gc.collect()
    found = sorted({*driver.broken(), *work.BROKEN})
    work.BROKEN.clear()
    assert not found, found
