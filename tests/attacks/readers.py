"""Every reader of bytes that strangers write: good examples, how to read them, and what a refusal is.

A reader that is new gets a row here; `harness` and the tests go by the table.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from odd_files import exif, gradient, jpeg, packed_bits, png, segment, short, tiff, with_segments
from PIL import Image
from torch_pickles import state, storage, tensor, text, zipped

from engine.bundle.files import read_archived, read_archived_array
from engine.bundle.manifest import read_manifest
from engine.bundle.onnx_file import check_graph
from engine.bundle.tokenizer import read_tokenizer
from engine.errors import RestoreError
from engine.image.decoding import decode_photo
from engine.image.encoding import encode_photo
from engine.image.files import read_provenance
from engine.image.photo import Photo
from engine.memory.size_plan import SizePlan
from engine.pipeline.plan import recorded_size_plan

#: Pixels that a fuzzed photo may have.
MAX_PIXELS = 1 << 22


@dataclass(frozen=True)
class Reader:
    """A reader of foreign bytes.

    Attributes:
        name: of the kind of file.
        example: makes a good file. Libraries that make files start threads, so it is called where they are read.
        read: reads bytes; given a folder of its own, for files.
        wrap: turns a changed example into the bytes to read, so that what lies inside of a checked shell is reached.
    """

    name: str
    example: Callable[[], bytes]
    read: Callable[[bytes, Path], Any]
    wrap: Callable[[bytes], bytes] = bytes


def fixed(data: bytes) -> Callable[[], bytes]:
    """Return what returns some bytes."""
    return lambda: data


def from_file(read: Callable[[Path], Any], name: str) -> Callable[[bytes, Path], Any]:
    """Return a function of bytes that reads them as a file of a name."""

    def from_bytes(data: bytes, folder: Path) -> Any:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return read(folder if "/" in name else file)

    return from_bytes


# -- photos -------------------------------------------------------------------------------------------

_LIBRARIES = {"HEIF": "pillow_heif", "JXL": "pillow_jxl", "TIFF16": "tifffile", "BIGTIFF": "tifffile"}
FORMATS = ("PNG", "PNG16", "JPEG", "WEBP", "TIFF", "TIFF16", "BIGTIFF", "TIFF12", "AVIF", "GIF", "BMP", "HEIF", "JXL")


def photo_file(kind: str) -> bytes:
    """Return a good file of a format, with metadata."""
    block = exif([(0x112, 3, 1, short(6)), (271, 2, 4, b"Cam\0")], [(37500, 7, 40, bytes(40))])
    pixels, file = gradient(64, 48), io.BytesIO()
    if kind == "JPEG":
        xmp = b"http://ns.adobe.com/xap/1.0/\0<x xmlns:h='http://ns.adobe.com/hdr-gain-map/1.0/' h:Version='1'/>"
        photoshop = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x08\x1c\x02\x78\0\3Oma"
        return with_segments(jpeg(pixels), segment(0xE1, block), segment(0xE1, xmp), segment(0xED, photoshop))
    if kind == "PNG16":
        return png(pixels.astype(np.uint16) * 257, [(b"eXIf", block[6:]), (b"cICP", bytes([9, 16, 0, 1]))], 16)
    if kind == "TIFF12":
        return tiff(packed_bits(pixels[:, :, 0].astype(int) * 16, 12).tobytes(), (12,), 0, width=64, height=48)
    if kind in ("TIFF16", "BIGTIFF"):
        import tifffile

        wide = pixels.astype(np.uint16) * 257
        tifffile.imwrite(file, wide, photometric="rgb", compression="lzw", bigtiff=kind == "BIGTIFF", rowsperstrip=8)
        return file.getvalue()
    if kind == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    if kind == "JXL":
        import pillow_jxl  # noqa: F401
    options: dict[str, Any] = {} if kind in ("GIF", "BMP") else {"exif": block}
    if kind == "TIFF":
        options = {"compression": "tiff_deflate"}
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _photo(data: bytes, folder: Path) -> None:
    photo = decode_photo(data, max_pixels=MAX_PIXELS)
    assert np.isfinite(photo.rgb).all()
    assert photo.rgb.min() >= 0
    assert photo.rgb.max() <= 1


def _photos() -> list[Reader]:
    kinds = [kind for kind in FORMATS if kind not in _LIBRARIES or find_spec(_LIBRARIES[kind])]
    return [Reader(f"photo, {kind}", partial(photo_file, kind), _photo) for kind in kinds]


# -- results --------------------------------------------------------------------------------------------

_SIZE_PLAN = SizePlan(128, 256)


def _provenance(file: Path) -> None:
    noted = read_provenance(file)
    recorded_size_plan(noted, (64, 48))
    json.dumps([noted.get(key) for key in ("photo", "bundle", "settings", "plan")])


def _results() -> list[Reader]:
    noted = {"bundle": {"digest": "0" * 64}, "settings": {"seed": 1}, "photo": {"bytes": 1, "modified_ns": 2}}
    noted["plan"] = {"size_px": [64, 48], **_SIZE_PLAN.as_data()}
    photo = Photo(gradient(64, 48).astype(np.float32) / 255)
    return [
        Reader(f"history, {suffix}", partial(encode_photo, photo, suffix, noted), from_file(_provenance, f"x{suffix}"))
        for suffix in (".png", ".jpg", ".webp", ".tif", ".avif")
    ]


# -- bundles ----------------------------------------------------------------------------------------------


def archive(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as opened:
        for name, data in members.items():
            opened.writestr(name, data)
    return target.getvalue()


def _array(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _bundle(folder: Path) -> list[Reader]:
    manifest = read_manifest(folder).manifest
    weights = manifest.weights

    def graph(data: bytes, _: Path) -> None:
        check_graph(data, "graph", weights=weights.name, weights_bytes=weights.bytes)

    def inside(name: str) -> Callable[[bytes], bytes]:
        return lambda data: archive({name: data})

    compact = json.dumps(json.loads((folder / "manifest.json").read_text()), separators=(",", ":")).encode()
    read_segments = from_file(partial(read_archived, name="a.onnx"), "x.zip")
    read_sample = from_file(partial(read_archived_array, name="a"), "x.npz")
    small = archive({"a.onnx": b"segment" * 100}, zipfile.ZIP_DEFLATED)
    array = _array(np.arange(8, dtype=np.float32).reshape(2, 4))
    return [
        Reader("manifest", fixed(compact), from_file(read_manifest, "b/../manifest.json")),
        Reader("graph", fixed((folder / "text_encoder.onnx").read_bytes()), graph),
        Reader("archive of segments", fixed(small), read_segments),
        Reader("parity sample", fixed(archive({"a.npy": array})), read_sample),
        Reader("parity sample, inside", fixed(array), read_sample, inside("a.npy")),
        Reader(
            "tokenizer", fixed((folder / "tokenizer.json").read_bytes()), lambda data, _: read_tokenizer(data, "it")
        ),
    ]


# -- checkpoints and LoRAs -----------------------------------------------------------------------------------

_MODULE = "base_model.model.unet.a"
_BASE = {"unet.a.weight": (4, 4)}


def _tensors(file: Path) -> None:
    from export.checkpoint.tensor_files import open_file

    for each in open_file(file).values():
        array = each.read()
        assert array.shape == each.shape
        array.astype(np.float64).sum()


def _lora(folder: Path) -> None:
    from export.checkpoint.lora import merge_into, open_lora

    lora = open_lora("a", folder / "l" / "adapter_model.safetensors", 1.0, _BASE)
    merge_into(np.zeros((4, 4), np.float32), "unet.a.weight", [lora])


def safetensors(header: bytes, body: bytes = bytes(128)) -> bytes:
    """Return a safetensors file of a header as it is."""
    return struct.pack("<Q", len(header)) + header + body


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    entries, place = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    return json.dumps(entries).encode()


_PAIR = _header({f"{_MODULE}.lora_A.weight": (4, 4), f"{_MODULE}.lora_B.weight": (4, 4)})
_LEGACY_HEAD = b"".join(
    pickle.dumps(each, 2)
    for each in (
        119547037146038801333356,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
    )
)


def _lora_config(data: bytes, folder: Path) -> None:
    (folder / "l").mkdir(exist_ok=True)
    (folder / "l" / "adapter_model.safetensors").write_bytes(safetensors(_PAIR))
    (folder / "l" / "adapter_config.json").write_bytes(data)
    _lora(folder)


def _lora_file(data: bytes, folder: Path) -> None:
    (folder / "l").mkdir(exist_ok=True)
    (folder / "l" / "adapter_config.json").unlink(missing_ok=True)
    (folder / "l" / "adapter_model.safetensors").write_bytes(data)
    _lora(folder)


def _index(folder: Path) -> None:
    from export.checkpoint.checkpoint import _open_component

    (folder / "unet" / "a.safetensors").write_bytes(safetensors(_PAIR))
    _open_component(folder / "unet")


def _vocabulary(folder: Path) -> None:
    from export.checkpoint.tokenizer import load_tokenizer

    for name, data in (("vocab.json", _VOCABULARY), ("merges.txt", _MERGES)):
        if not (folder / "t" / name).exists():
            (folder / "t" / name).write_bytes(data)
    load_tokenizer(folder / "t").encode("a photo of ab")


_VOCABULARY = json.dumps(
    {"a": 0, "b": 1, "ab": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}
).encode()
_MERGES = b"#version: 0.2\na b\na b</w>\n"


def _checkpoints() -> list[Reader]:
    from export.checkpoint.model_kinds import require_noise_scheduler

    values = text("b") + b"q\x01" + tensor(shape=(2, 2), strides=(2, 1)) + text("c") + tensor(shape=(), strides=())
    pickled = state(tensor())[:-2] + b"s(" + values + b"u."
    index = json.dumps({"metadata": {}, "weight_map": {f"{_MODULE}.lora_A.weight": "a.safetensors"}}).encode()
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"a": 4},
        "alpha_pattern": {r"^x\.(a|b)+$": 2},
    }
    scheduler = json.dumps({"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}).encode()
    tensors = from_file(_tensors, "x.ckpt")
    safe = from_file(_tensors, "x.safetensors")
    readers = [
        Reader("safetensors", fixed(safetensors(_PAIR)), safe),
        Reader("safetensors, header", fixed(_PAIR), safe, safetensors),
        Reader("checkpoint, zip", fixed(zipped(pickled)), tensors),
        Reader("checkpoint, pickle", fixed(pickled), tensors, zipped),
        Reader(
            "index of shards", fixed(index), from_file(_index, "unet/diffusion_pytorch_model.safetensors.index.json")
        ),
        Reader("scheduler", fixed(scheduler), from_file(require_noise_scheduler, "scheduler/scheduler_config.json")),
        Reader("LoRA", fixed(safetensors(_PAIR)), _lora_file),
        Reader("LoRA, configuration", fixed(json.dumps(config).encode()), _lora_config),
        Reader("vocabulary", fixed(_VOCABULARY), from_file(_vocabulary, "t/vocab.json")),
        Reader("merges", fixed(_MERGES), from_file(_vocabulary, "t/merges.txt")),
    ]
    if find_spec("torch"):
        kept = storage().replace(b"tQ", b"NtQ")
        old = b"\x80\x02}" + text("a") + tensor(held=kept) + b"s."
        tail = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
        readers.append(Reader("checkpoint, before 1.6", fixed(old), tensors, lambda data: _LEGACY_HEAD + data + tail))
    return readers


# -- builds, requests, caches ----------------------------------------------------------------------------------


def _state(file: Path) -> None:
    from export.build.steps import _resume

    _resume(file.parent, {"preset": "ours"})


def _trace(file: Path) -> None:
    from export.graphs.traces import read_trace

    read_trace(file)


def _architecture(file: Path) -> None:
    from export.graphs.traces import read_architecture

    read_architecture.__wrapped__(file)


def _others() -> list[Reader]:
    from export.graphs.traces import SHIPPED
    from triton_repo.protocol import parse_options

    options = json.dumps({"steps": 4, "prompt": "a", "format": "jpeg", "timeout_s": 2.5, "tile": "auto"}).encode()
    kept = json.dumps({"key": {"preset": "ours"}, "weights": {"name": "w", "bytes": 1, "sha256": "0" * 64}}).encode()
    traced = min(SHIPPED.glob("*/*.xz"), key=lambda file: file.stat().st_size).read_bytes()
    described = next(SHIPPED.glob("*/*.json")).read_bytes()

    def request(data: bytes, _: Path) -> None:
        from engine.settings import Settings

        changes, _delivery = parse_options(data)
        Settings().updated(changes)

    return [
        Reader("request, options", fixed(options), request),
        Reader("state of a build", fixed(kept), from_file(_state, "state.json")),
        Reader("trace", fixed(traced), from_file(_trace, "x.xz")),
        Reader("architecture", fixed(described), from_file(_architecture, "x.json")),
    ]


#: What a reader may end with: an error of ours.
REFUSALS = (RestoreError,)


def all_readers(bundle: Path) -> list[Reader]:
    """Return the table; `bundle` is a good one, whose files are examples."""
    return [*_photos(), *_results(), *_bundle(bundle), *_checkpoints(), *_others()]
