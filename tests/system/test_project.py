"""The project's own rules: imports one way, README commands that exist, figures with their source."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def test_imports_go_one_way():
    command = shutil.which("lint-imports", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("import-linter is not installed: pip install -e '.[test]'")
    done = subprocess.run([command, "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 6 kept, 0 broken" in done.stdout


def test_modules_can_be_read_at_one_sitting():
    long = {
        str(path.relative_to(ROOT)): lines
        for package in ("engine", "export", "benchmarks", "triton_repo")
        for path in (ROOT / package).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 450
    }
    assert long == {}


def options_of(help_text):
    return set(re.findall(r"--[a-z][a-z-]+", help_text))


@pytest.mark.parametrize(
    ("head", "command"),
    [
        ("python -m engine.restore", ["-m", "engine.restore"]),
        ("python export/build_engines.py", [str(ROOT / "export" / "build_engines.py")]),
        ("python benchmarks/latency.py", [str(ROOT / "benchmarks" / "latency.py")]),
        ("python benchmarks/serving.py", [str(ROOT / "benchmarks" / "serving.py")]),
        ("python triton_repo/render.py", [str(ROOT / "triton_repo" / "render.py")]),
        ("python triton_repo/serve.py", [str(ROOT / "triton_repo" / "serve.py")]),
        ("python triton_repo/client.py", [str(ROOT / "triton_repo" / "client.py")]),
    ],
)
def test_options_in_the_readme_exist(head, command):
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, check=True)
    known = options_of(done.stdout)
    joined = README.replace("\\\n", " ")
    uses = [line for line in joined.splitlines() if head in line]
    assert uses, f"the README never shows `{head}`"
    for line in uses:
        for part in line.split("&&"):
            if head in part:
                assert options_of(part) <= known, part


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name


def test_the_commands_of_the_readme_are_what_ci_runs():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    script = (ROOT / ".ci" / "run").read_text()
    for number, block in enumerate(blocks, 1):
        assert f"readme_command {number}" in script
        assert len(block.strip().splitlines()) == 1, "a README command is one line"


def test_python_in_the_readme_runs(bundle_fp32, photo_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace('"bundles/ours"', repr(str(bundle_fp32))).replace('"photo.jpg"', repr(str(photo_path)))
    names = {}
    exec(code, names)
    assert names["result"].photo.rgb.shape == (256, 384, 3)
    assert names["result"].settings.seed == 7
