"""The engine without any of export's libraries, and a build without those of tracing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
#: What the extra `export` brings and the extra `build` does not.
OF_TRACING = ("torch", "diffusers", "transformers", "peft", "onnxscript", "onnx_ir")
FORBIDDEN = (*OF_TRACING, "onnx", "safetensors", "ml_dtypes", "export", "benchmarks")

#: What the extras `web` and `captions` bring, and the modules that are made of it.
OF_PAGE = ("gradio", "gradio_client", "fastapi", "starlette", "uvicorn", "jinja2", "httpx", "tenacity")
PAGE = (
    "engine.page.controls",
    "engine.page.faces",
    "engine.page.fragments",
    "engine.page.layout",
    "engine.page.presets",
)

MODULES = sorted(
    {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "engine").rglob("*.py")
    }
    - set(PAGE)
)


def bare(code, *arguments, without=FORBIDDEN):
    """Run a program in an environment that lacks some packages."""
    head = f"import sys\nfor name in {without!r}: sys.modules[name] = None  # an import fails, a look finds nothing\n"
    return subprocess.run(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


def test_the_bare_environment_is_bare():
    assert "ModuleNotFoundError: import of torch halted" in bare("import torch").stderr


def test_every_module_of_the_engine_imports():
    code = "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = bare(code, *MODULES, without=(*FORBIDDEN, *OF_PAGE))
    assert done.returncode == 0, done.stderr
    assert len(MODULES) > 15


def test_a_photo_is_restored(bundle_fp32, photo_path, tmp_path):
    code = """
from engine.cli.console import run_command
from engine.restore import main
sys.exit(run_command(main))
"""
    done = bare(code, photo_path, "-o", tmp_path / "out.png", "--bundle", bundle_fp32, "--quiet")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").stat().st_size > 1000


BUILD = """
from engine.cli.console import run_command
from export.build_engines import main
sys.exit(run_command(main))
"""


def test_the_demo_is_built_without_torch(demo_bundle, tmp_path):
    """The same files as where torch is installed, and nothing of it is imported."""
    done = bare(BUILD, "--output", tmp_path / "demo", "--quiet", without=OF_TRACING)
    assert done.returncode == 0, done.stderr
    files = [path for path in demo_bundle.iterdir() if path.name != "manifest.json"]
    assert len(files) > 8
    for path in files:
        assert (tmp_path / "demo" / path.name).read_bytes() == path.read_bytes(), path.name


def test_checkpoints_are_read_without_torch(tiny, tmp_path):
    """SUPIR's `.ckpt`, and what a build would make of it."""
    import layouts

    layouts.edit(tiny.supir, tmp_path / "supir.ckpt")
    files = ["--sdxl", tiny.sdxl, "--supir", tmp_path / "supir.ckpt", "--tokenizer", tiny.tokenizer]
    options = ["--preset", "lightning", "--dry-run", "--output", tmp_path / "b"]
    done = bare(BUILD, *files, *options, without=OF_TRACING)
    assert done.returncode == 0, done.stderr
    assert "34,686,995 parameters" in done.stdout
    assert done.stdout.count("trace shipped") == 7


def test_an_old_pickle_needs_torch_and_says_so(tmp_path):
    torch = pytest.importorskip("torch", reason="not here: the export extra")
    file = tmp_path / "supir.ckpt"
    torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    options = ["--sdxl", file, "--supir", file, "--tokenizer", tmp_path, "--preset", "lightning"]
    done = bare(BUILD, *options, without=OF_TRACING)
    assert done.returncode == 1
    assert "before version 1.6, which only torch reads" in done.stderr
    assert "pip install -e '.[export]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["onnx", "safetensors", "ml_dtypes"])
def test_building_says_what_is_missing(tmp_path, package):
    done = bare(BUILD, "--output", tmp_path / "bundle", without=(package, *OF_TRACING))
    assert done.returncode == 1
    assert f"no module {package}" in done.stderr
    assert "pip install -e '.[build]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["engine", "engine.errors", "engine.settings", "engine.bundle.manifest"])
def test_light_modules_stay_light(module):
    """What serving and tools import must not pull onnxruntime in."""
    done = bare(f"import {module}; print('onnxruntime' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
