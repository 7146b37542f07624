"""Write the pages in docs/help from the commands' own --help.

python docs/make_help.py            write them
python docs/make_help.py --check    only say which of them are out of date
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "help"
#: By page, the commands that it shows: the console command, and the module path or file that does the same.
COMMANDS = {
    "restore": [("restoration-engine restore", ["-m", "engine.restore"])],
    "web": [("restoration-engine web", ["-m", "engine.web"])],
    "build": [("restoration-engine build", ["export/build_engines.py"])],
    "train": [("restoration-engine train", ["export/train_lora.py"])],
    "serve": [("restoration-engine serve", ["triton_repo/serve.py"])],
    "render": [("restoration-engine render", ["triton_repo/render.py"])],
    "client": [("restoration-engine client", ["triton_repo/client.py"])],
    "compare": [("restoration-engine compare", ["-m", "benchmarks.compare"])],
    "benchmark": [
        ("restoration-engine benchmark latency", ["benchmarks/latency.py"]),
        ("restoration-engine benchmark serving", ["benchmarks/serving.py"]),
        ("restoration-engine benchmark quality", ["benchmarks/quality.py"]),
        ("restoration-engine benchmark seams", ["benchmarks/seams.py"]),
        ("restoration-engine benchmark faces", ["benchmarks/faces.py"]),
        ("restoration-engine benchmark scaling", ["benchmarks/scaling.py"]),
        ("restoration-engine benchmark soak", ["benchmarks/soak.py"]),
        ("restoration-engine benchmark gpu", ["benchmarks/gpu_session.py"]),
    ],
    "index": [("restoration-engine", ["-m", "engine.cli.main"])],
}
_TITLES = {"index": "All commands", "benchmark": "benchmark"}
#: Python before 3.13 repeats an option's value: `-o FILE, --output FILE`; later ones write `-o, --output FILE`.
_REPEATED = re.compile(r"^( +-\w) (\S+)(, --[\w-]+ \2)$", re.MULTILINE)


def help_of(command: list[str]) -> str:
    """Return a command's --help at a width of 100, the same on every computer."""
    environment = {
        **os.environ,
        "COLUMNS": "100",
        "PYTHON_COLORS": "0",
        "NO_COLOR": "1",
        "PYTHONPATH": str(ROOT),
        "RESTORE_BUNDLE": "~/.local/share/restoration-engine/bundle",
    }
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return _REPEATED.sub(r"\1\3", done.stdout).rstrip()


def page_of(name: str) -> str:
    """Return the text of a page."""
    parts = [f"# {_TITLES.get(name, name)}", "", "This page is made by `docs/make_help.py`."]
    several = len(COMMANDS[name]) > 1
    for title, command in COMMANDS[name]:
        if several:
            parts += ["", f"## {title.split()[-1]}"]
        parts += ["", f"`{title}` is `python {' '.join(command)}`.", "", "```text", help_of(command), "```"]
    return "\n".join(parts) + "\n"


def words(text: str) -> list[str]:
    """Return a page without its line breaks, which differ between versions of Python."""
    return text.split()


def stale_pages() -> list[str]:
    """Return the names of the pages that do not say what their commands say now."""
    return [
        name
        for name in COMMANDS
        if not (file := PAGES / f"{name}.md").exists()
        or words(file.read_text(encoding="utf-8")) != words(page_of(name))
    ]


def main() -> int:
    """Write the pages, or check them."""
    if "--check" in sys.argv[1:]:
        stale = stale_pages()
        for name in stale:
            print(f"docs/help/{name}.md is out of date: python docs/make_help.py", file=sys.stderr)
        return 1 if stale else 0
    PAGES.mkdir(exist_ok=True)
    for name in COMMANDS:
        (PAGES / f"{name}.md").write_text(page_of(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
