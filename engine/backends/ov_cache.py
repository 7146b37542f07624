"""Compiled models between runs: OpenVINO's own, without their weights, in the user's cache folder.

OpenVINO has a cache too. This one differs in two ways. A file there whose weights are damaged was read, and
gave other results without an error; here each file carries its SHA-256. And its files hold the weights,
5 GB for SDXL's UNet at each size; these hold the graph, and the weights stay in the bundle, whose hash is in the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.bundle.storage import cache_dir, write_cache

#: Part of every key: another way to make files, or to read them, is another number.
_FORMAT = 2
_SUFFIX = ".blob"
_HASH_BYTES = hashlib.sha256().digest_size
#: Of all files together; those that were used least lately go. A model is 1 MB for the demo's UNet.
MAX_BYTES = 512 << 20


def cache_key(
    *,
    version: str,
    processor: str,
    properties: Mapping[str, Any],
    graph: str,
    weights: str,
    part: str,
    shapes: Mapping[str, Sequence[int]],
) -> str:
    """Return the name of a compiled model, a hash of all that it depends on.

    Args:
        version: of OpenVINO.
        processor: its name, with its instruction sets.
        properties: that it is compiled with.
        graph, weights: SHA-256 of the ONNX file and of the weights' file.
        part: of the graph.
        shapes: of its inputs.
    """
    depends_on = {
        "format": _FORMAT,
        "version": version,
        "processor": processor,
        "properties": {name: str(value) for name, value in properties.items()},
        "graph": graph,
        "weights": weights,
        "part": part,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def load(key: str) -> bytes | None:
    """Return a compiled model; None where there is none, or its file is damaged."""
    file = _file(key)
    try:
        content = file.read_bytes()
        os.utime(file)  # used now
    except OSError:
        return None
    model = content[_HASH_BYTES:]
    if hashlib.sha256(model).digest() != content[:_HASH_BYTES]:
        drop(key)
        return None
    return model


def store(key: str, model: bytes) -> None:
    """Keep a compiled model, and drop others where all together are too large; that it cannot be kept is no error."""
    if len(model) > MAX_BYTES // 4:
        return
    file = _file(key)
    write_cache(file, hashlib.sha256(model).digest() + model)
    with contextlib.suppress(OSError):
        _prune(file.parent)


def drop(key: str) -> None:
    """Remove a compiled model that is of no use."""
    with contextlib.suppress(OSError):
        _file(key).unlink()


def _file(key: str) -> Path:
    return cache_dir() / "openvino" / f"{key}{_SUFFIX}"


def _prune(folder: Path) -> None:
    found = sorted(((file.stat(), file) for file in folder.glob(f"*{_SUFFIX}")), key=lambda item: item[0].st_mtime_ns)
    total = sum(state.st_size for state, _ in found)
    for state, file in found:
        if total <= MAX_BYTES:
            break
        file.unlink(missing_ok=True)
        total -= state.st_size
