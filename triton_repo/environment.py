"""The server's programs: NVIDIA's container has them; elsewhere they come from a wheel, in an environment of their own.

The wheel (`nvidia-pytriton`, for Linux on x86-64) carries a whole tritonserver whose Python backend needs NumPy 1, so
it cannot share an environment with the rest of the project. It is installed once, into the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock

import engine
import triton_repo
from engine.bundle.storage import APP_NAME, cache_dir
from engine.errors import BackendError, RestoreError

WHEEL = "nvidia-pytriton==0.7.0"
#: With NumPy 2 the outputs of this build's Python models come back empty.
NUMPY = "numpy>=1.26,<2"
#: Of Python, for which the wheel has stubs and NumPy 1 has wheels.
PYTHONS = ("3.10", "3.11", "3.12")
_CONTAINER = Path("/opt/tritonserver")
_MARK = "complete.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Programs:
    """Where the server and what it loads lie.

    Attributes:
        server: the program.
        backends, caches: its folders.
        environment: variables that it needs.
    """

    server: Path
    backends: Path
    caches: Path
    environment: dict[str, str]


def find_programs(say: Say = lambda line: None) -> Programs:
    """Return the server's programs; they are installed if they are missing.

    Args:
        say: told what takes long.
    Raises:
        BackendError: they cannot run here, or cannot be installed.
    """
    if (_CONTAINER / "bin" / "tritonserver").is_file():
        # Its Python is the system's, into which the image has installed this project.
        return Programs(
            _CONTAINER / "bin" / "tritonserver", _CONTAINER / "backends", _CONTAINER / "caches", dict(os.environ)
        )
    _check_computer()
    requirements = _requirements()
    key = hashlib.sha256(json.dumps([sys.version, requirements]).encode()).hexdigest()[:12]
    folder = cache_dir() / f"triton-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / _MARK).is_file():
            say(f"installing the server into {folder}, once (300 MB; about a minute)")
            _install(folder, requirements)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    server = packages / "pytriton" / "tritonserver"
    variables = dict(os.environ)
    # The stub finds its Python as a shell would, and our code in a folder that holds nothing else.
    variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{variables.get('PATH', '')}"
    variables["PYTHONPATH"] = str(_code(folder))
    variables.pop("PYTHONHOME", None)
    library = sysconfig.get_config_var("LIBDIR")
    if library and (Path(library) / _libpython()).exists():
        variables["LD_LIBRARY_PATH"] = f"{library}{os.pathsep}{variables.get('LD_LIBRARY_PATH', '')}".rstrip(os.pathsep)
    return Programs(server / "bin" / "tritonserver", server / "backends", server / "caches", variables)


def _check_computer() -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    container = "or use NVIDIA's container: triton_repo/deploy"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise BackendError(
            "the server's wheel is for Linux on x86-64",
            found=f"{sys.platform}, {platform.machine()}",
            fix=container.removeprefix("or "),
        )
    if version not in PYTHONS:
        raise BackendError(
            "the server's wheel has no Python backend for this Python",
            expected=", ".join(PYTHONS),
            found=version,
            fix=f"use another Python, {container}",
        )
    name, glibc = platform.libc_ver()
    if name == "glibc" and tuple(map(int, re.findall(r"\d+", glibc)[:2])) < (2, 35):
        raise BackendError("the server's wheel needs glibc 2.35", found=glibc, fix=f"use a newer Linux, {container}")
    if not _has_libpython():
        raise BackendError(
            f"the server's Python backend needs {_libpython()}",
            found="none",
            fix=f"install it (Debian and Ubuntu: apt-get install libpython{version}), {container}",
        )


def _libpython() -> str:
    return f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"


def _has_libpython() -> bool:
    folder = sysconfig.get_config_var("LIBDIR")
    if folder and (Path(folder) / _libpython()).exists():
        return True
    try:
        ctypes.CDLL(_libpython())
    except OSError:
        return False
    return True


def _requirements() -> list[str]:
    """Return what the server's environment holds: this environment's versions, so that results are the same."""
    found = [WHEEL, NUMPY]
    for line in metadata.requires(APP_NAME) or []:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is None or "extra ==" in line or name[0] == "numpy":
            continue
        found.append(f"{name[0]}=={metadata.version(name[0])}")
    return found


def _install(folder: Path, requirements: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise BackendError(
                "the server cannot be installed",
                where=" ".join(command[:4]),
                found=lines[-1] if lines else None,
                fix="is a package index within reach? The same command runs again at the next start",
            )
    (server,) = folder.glob("lib/python*/site-packages/pytriton/tritonserver")
    stubs = server / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}"
    for stub in stubs.iterdir():
        shutil.copy2(stub, server / "backends" / "python" / stub.name)
    (folder / _MARK).write_text(json.dumps(requirements))


def _code(folder: Path) -> Path:
    """Return a folder with links to our two packages alone; beside them lie packages for another NumPy."""
    sources = {module.__name__: Path(str(module.__file__)).parent.resolve() for module in (engine, triton_repo)}
    key = hashlib.sha256(json.dumps({name: str(path) for name, path in sources.items()}).encode()).hexdigest()[:12]
    code = folder / f"code-{key}"
    code.mkdir(exist_ok=True)
    for name, source in sources.items():
        link = code / name
        try:
            link.symlink_to(source, target_is_directory=True)
        except FileExistsError:
            if link.resolve() != source:
                raise RestoreError("leads elsewhere", where=link, expected=source, fix="remove it") from None
    return code
