"""The engine without any of export's libraries: every module imports, and a photo is restored."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FORBIDDEN = ("torch", "onnx", "diffusers", "transformers", "peft", "safetensors", "onnxscript", "export", "benchmarks")

BARE = f"""
import sys

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} in a bare environment", name=name)

sys.meta_path.insert(0, Bare())
"""

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "engine").rglob("*.py")
)


def bare(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", BARE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


def test_the_bare_environment_is_bare():
    assert "No module named 'torch' in a bare environment" in bare("import torch").stderr


def test_every_module_of_the_engine_imports():
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = bare(code, *MODULES)
    assert done.returncode == 0, done.stderr
    assert len(MODULES) > 15


def test_a_photo_is_restored(bundle_fp32, photo_path, tmp_path):
    code = """
from engine.console import run_command
from engine.restore import main
sys.exit(run_command(main))
"""
    done = bare(code, photo_path, "-o", tmp_path / "out.png", "--bundle", bundle_fp32, "--quiet")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_building_says_what_is_missing(tmp_path):
    code = """
sys.meta_path[0].find_spec = lambda name, path=None, target=None: (
    (_ for _ in ()).throw(ModuleNotFoundError(f"No module named {name!r}", name=name)) if name == "torch" else None
)
sys.argv = ["build_engines.py", "--output", sys.argv[1], *sys.argv[2:]]
from engine.console import run_command
from export.build_engines import main
sys.exit(run_command(main))
"""
    for arguments in ([], ["--sdxl", "a", "--supir", "b", "--tokenizer", "c", "--lora", "face=d"]):
        done = bare(code, tmp_path / "bundle", *arguments)
        assert done.returncode == 1
        assert "no module torch" in done.stderr
        assert "pip install -e '.[export]'" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["engine", "engine.errors", "engine.settings", "engine.bundle"])
def test_light_modules_stay_light(module):
    """What serving and tools import must not pull onnxruntime in."""
    done = bare(f"import {module}; print('onnxruntime' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
