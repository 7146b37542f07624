"""The project's own rules: imports one way, short modules, types that ship, a README that runs."""

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


def test_types_ship_with_every_package():
    pyproject = (ROOT / "pyproject.toml").read_text()
    for package in ("engine", "export", "benchmarks", "triton_repo"):
        assert (ROOT / package / "py.typed").exists()
        assert f'{package} = ["py.typed"]' in pyproject


def test_the_readme_is_one_page():
    assert len(README.split()) <= 700


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
