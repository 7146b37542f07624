"""A bundle: the folder in which export and engine meet. Its manifest's schema, reading, checking.

A bundle is complete and describes itself: graphs, weights, tokenizer, defaults, where the weights
came from and what is known of each graph's agreement with its torch module. The engine trusts nothing
else, and it trusts no file whose hash is not the manifest's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from platformdirs import user_data_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from engine.bundle.files import (
    MANIFEST,
    REBUILD,
    Bytes,
    File,
    check_again,
    check_file,
    read_archived,
    read_bounded,
    read_checked,
)
from engine.bundle.graphspec import GraphSpec, Precision, parse_axis
from engine.bundle.hashing import FileState
from engine.bundle.interface import problems
from engine.bundle.onnx_file import check_graph
from engine.bundle.profiles import Profile
from engine.bundle.storage import APP_NAME
from engine.bundle.tokenizer import read_tokenizer
from engine.bundle.verification import Verification
from engine.errors import BundleError, UsageError
from engine.recipe import GRAPHS
from engine.settings import Settings

FORMAT = 6
#: Inputs of a segment with a norm: the map's mean, and 1 / √(variance + ε).
STATISTICS = ("mean", "inverse")


#: What a preset may be called: it is written on command lines and shown on pages.
PresetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]

#: What takes part in 32-bit arithmetic somewhere.
Int32 = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Audit(_Model):
    """What share of a plan's heavy work is in which type, counted at one size.

    Attributes:
        flops: multiplications and additions of convolutions and matrix products, by type.
        share_16_bit: of them that are in float16 or bfloat16.
        symbols: the size they were counted at.
        inspected_share: of the work whose type the compiled plan told, through the engine inspector; of
            the rest, the typed graph told it.
    """

    flops: dict[str, int]
    share_16_bit: float
    symbols: dict[str, int]
    inspected_share: float = 0.0


class TrtEngine(_Model):
    """A graph compiled for GPUs.

    Attributes:
        library: that compiled it and alone can run it, with its version.
        targets: compute capabilities that it is for, such as "8.9".
        device: the one kind of GPU that it is for; None where all of a capability can run it.
        profiles: sizes that it takes; the first that holds an input is used.
        weight_stripped: whether weights are filled in when it is opened, from the bundle's weights file.
        flags: that it was compiled with.
        key: of all that it depends on, see `plan_key`.
    """

    file: File
    library: str
    targets: tuple[str, ...]
    device: str | None
    profiles: tuple[Profile, ...]
    weight_stripped: bool
    flags: tuple[str, ...]
    audit: Audit
    key: str


class Norm(_Model):
    """A group norm that a segment begins with: it is given the statistics of the whole map.

    Attributes:
        map: its name.
        groups: of channels, each normalized by its own mean and variance.
        eps: added to the variance.
    """

    map: str
    groups: Annotated[Int32, Field(gt=0)]
    eps: Annotated[float, Field(gt=0, lt=1)]


class VaeSegment(_Model):
    """A part of a graph that is exact on a few rows of an image; `engine.memory.vae_slices` runs one after the other.

    Attributes:
        spec: inputs and outputs are maps, by their names: the graph's own input and output, and what one segment
            gives and another takes. Behind the maps a segment with a norm takes `STATISTICS`, f32[B,C,1,1] each.
        norm: that the segment begins with, if it does.
        halo: rows above and below its own that it must see of a map, in the map's rows.
        whole: maps that it must see as a whole.
    """

    spec: GraphSpec
    norm: Norm | None
    halo: tuple[Annotated[int, Field(ge=0, le=64)], Annotated[int, Field(ge=0, le=64)]]
    whole: tuple[str, ...]

    @property
    def maps(self) -> tuple[str, ...]:
        """The names of the maps that it takes."""
        return tuple(tensor.name for tensor in self.spec.inputs if tensor.name not in STATISTICS)

    @property
    def file_name(self) -> str:
        """Its graph's name in the file of segments."""
        return f"{self.spec.name}.onnx"


class Graph(_Model):
    """One ONNX graph, and the plan it was compiled to; its weights lie in the bundle's weights file.

    Attributes:
        weights_bytes: of its parameters as they are stored, some of which other graphs may share.
        weights_in_int8: whether its matrices are stored in int8, which the graph multiplies out to its precision.
        parity_sample: inputs, and what the graph must make of them: a weight-stripped plan is checked by it.
        segments: the same graph cut into segments, in the order in which they run; none where it cannot be.
        segments_file: a zip file of the segments' graphs.
    """

    spec: GraphSpec
    file: File
    verification: Verification
    weights_bytes: Bytes
    weights_in_int8: bool = False
    plan: TrtEngine | None = None
    parity_sample: File | None = None
    segments: tuple[VaeSegment, ...] = ()
    segments_file: File | None = None

    @property
    def files(self) -> tuple[File, ...]:
        """Its files in the bundle's folder."""
        plan = None if self.plan is None else self.plan.file
        return tuple(file for file in (self.file, plan, self.parity_sample, self.segments_file) if file is not None)


class TokenizerFile(_Model):
    """The text vocabulary, and the ids that frame and fill a chunk of 77 tokens."""

    file: File
    start_id: Int32
    end_id: Int32
    pad_id: Int32
    pad_id_2: Int32


class Source(_Model):
    """A checkpoint that weights came from."""

    role: str
    name: str
    layout: str
    bytes: int
    sha256: str


class Lora(_Model):
    """A LoRA that was merged: W' = W + scale · ΔW, over `layers` weights; `kinds` are formulas of ΔW, such as LoHa."""

    name: str
    file: str
    sha256: str
    scale: float
    kinds: tuple[str, ...] = ("LoRA",)
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    layers: int


class Manifest(_Model):
    """The bundle's table of contents.

    Attributes:
        key: everything that the bundle was made from; a build with the same key changes nothing.
        notice: what everybody who uses the bundle should know; may be empty.
        preset: name of the defaults.
        defaults: of a restoration.
        presets: other settings that fit the networks, by name.
        frequencies: of the sinusoids that embed micro-conditioning, as the networks were trained
            with: torch's float32 exponentials. Another library's last bit, times 1024, shows in
            the sixth digit of the vector.
    """

    format: int
    name: str
    preset: str
    precision: Precision
    backend: str
    built: str
    built_with: dict[str, str]
    key: dict[str, Any]
    notice: str
    defaults: Settings
    presets: Annotated[dict[PresetName, Settings], Field(max_length=50)] = {}
    weights: File
    tokenizer: TokenizerFile
    frequencies: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    graphs: dict[str, Graph]
    sources: tuple[Source, ...]
    loras: tuple[Lora, ...]

    def settings(self, preset: str | None = None) -> Settings:
        """Return the settings that a preset stands for.

        Args:
            preset: its name; None for the defaults.
        Raises:
            UsageError: the bundle has none of that name.
        """
        named = {**self.presets, self.preset: self.defaults}
        if preset is None:
            return self.defaults
        if preset not in named:
            known = ", ".join([self.preset, *self.presets])
            raise UsageError("the bundle has no such preset", where="preset", expected=known, found=repr(preset))
        return named[preset]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: its folder.
        manifest: its table of contents.
        digest: SHA-256 of the manifest, and through it of everything in the bundle.
        states: of the files that were checked, by their names.
    """

    path: Path
    manifest: Manifest
    digest: str
    states: dict[str, FileState] = field(default_factory=dict, compare=False)

    @property
    def latent_channels(self) -> int:
        channels = self.spec("vae_decoder").tensor("z").shape[1]
        assert isinstance(channels, int)
        return channels

    @property
    def pixels_per_cell(self) -> int:
        """Side of the square of pixels that one latent cell stands for."""
        _, ratio = parse_axis(self.spec("vae_decoder").tensor("pixels").shape[2])
        return int(ratio)

    @property
    def size_multiple(self) -> int:
        """What the sides of a worked image must be a multiple of, in pixels."""
        return self.pixels_per_cell * self.spec("unet").multiples["h"]

    @property
    def has_segments(self) -> bool:
        """Tell whether the VAE's graphs come as segments too."""
        return all(self.manifest.graphs[graph].segments for graph in self.vae_graphs)

    @property
    def vae_graphs(self) -> tuple[str, ...]:
        """The graphs that see pixels: two halves of the VAE, and SUPIR's encoder, which is another first half."""
        return tuple(name for name, graph in self.manifest.graphs.items() if graph.spec.role == "vae")

    def spec(self, graph: str) -> GraphSpec:
        return self.manifest.graphs[graph].spec

    def file(self, entry: File) -> Path:
        """Return where a file lies.

        Raises:
            BundleError: it is missing, or another one than when the bundle was opened.
        """
        if entry.name in self.states:
            self.states[entry.name] = check_again(self.path, entry, self.states[entry.name])
        return self.path / entry.name

    def read_graph(self, graph: str) -> bytes:
        """Return a graph's ONNX file without its weights, which lie in the bundle's folder.

        What is returned is what was hashed, whatever has become of the file since.

        Raises:
            BundleError: the file or the weights were changed, or the graph holds what no bundle's graph may hold.
        """
        entry = self.manifest.graphs[graph].file
        self.file(self.manifest.weights)
        content = read_checked(self.path, entry)
        self.check_graph(content, self.path / entry.name)
        return content

    def read_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the text encoders.

        Raises:
            BundleError: it was changed, is damaged, or no tokenizer of CLIP's kind.
        """
        entry = self.manifest.tokenizer.file
        return read_tokenizer(read_checked(self.path, entry), self.path / entry.name)

    def read_segment(self, graph: str, segment: VaeSegment) -> bytes:
        """Return the ONNX file of a graph's segment without its weights; see `read_graph`.

        Raises:
            BundleError: as `read_graph`; or the graph has no segments.
        """
        archive = self.manifest.graphs[graph].segments_file
        if archive is None:
            raise BundleError("the graph has no segments", where=f"{self.path}: {graph}")
        self.file(self.manifest.weights)
        content = read_archived(self.file(archive), segment.file_name)
        self.check_graph(content, f"{self.path / archive.name}: {segment.file_name}")
        return content

    def check_graph(self, content: bytes, where: object) -> None:
        """Check what an ONNX file of this bundle holds; see `engine.bundle.onnx_file.check_graph`."""
        weights = self.manifest.weights
        check_graph(content, where, weights=weights.name, weights_bytes=weights.bytes)

    def files(self) -> tuple[File, ...]:
        graphs = (file for graph in self.manifest.graphs.values() for file in graph.files)
        return (*graphs, self.manifest.weights, self.manifest.tokenizer.file)


def default_bundle_dir() -> Path:
    """Return where bundles are built and looked for when none is named: $RESTORE_BUNDLE or user data."""
    named = os.environ.get("RESTORE_BUNDLE")
    return Path(named) if named else user_data_path(APP_NAME) / "bundle"


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check every file's size and hash; see `engine.bundle.hashing` for large ones.

    Raises:
        BundleError: there is none, it is of another version, or a file is missing or changed.
    """
    bundle = read_manifest(path)
    entries = bundle.files()
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        states = list(pool.map(lambda entry: check_file(path, entry), entries))
    return replace(bundle, states={entry.name: state for entry, state in zip(entries, states, strict=True)})


def read_manifest(path: Path) -> Bundle:
    """Open a bundle without reading its large files.

    Raises:
        BundleError: there is none, or its manifest is damaged or of another version.
    """
    file = path / MANIFEST
    rebuild = REBUILD.format(path=path)
    try:
        text = read_bounded(file)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError("no bundle here", where=path, expected=MANIFEST, fix=rebuild) from None
    except OSError as error:
        raise BundleError(f"cannot be read: {error.strerror}", where=file) from error
    found = _format_of(text)
    if found is not None and found != FORMAT:
        raise BundleError(
            "made by another version", where=file, expected=f"format {FORMAT}", found=f"format {found}", fix=rebuild
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            "the manifest is damaged", where=file, found=f"{place}: {first['msg']}", fix=rebuild
        ) from error
    if set(manifest.graphs) != set(GRAPHS):
        raise BundleError("wrong set of graphs", where=file, expected=GRAPHS, found=sorted(manifest.graphs))
    problem = next(problems(manifest), None)
    if problem is not None:
        raise BundleError("the manifest does not describe what the engine runs", where=file, found=problem, fix=rebuild)
    return Bundle(path, manifest, hashlib.sha256(text).hexdigest())


def plan_key(
    graph: File,
    weights: File | None,
    *,
    library: str,
    targets: Sequence[str],
    device: str | None,
    profiles: Sequence[Profile],
    flags: Sequence[str],
    precision: Precision,
) -> str:
    """Return the SHA-256 of all that a plan depends on; another key means another plan.

    Args:
        graph: the ONNX file. weights: that are compiled in; None for a weight-stripped plan.
        library, targets, device, profiles, flags: as in `Plan`.
        precision: of the graph.
    """
    parts = {
        "graph": graph.sha256,
        "weights": None if weights is None else weights.sha256,
        "library": library,
        "targets": list(targets),
        "device": device,
        "profiles": [profile.model_dump(mode="json") for profile in profiles],
        "flags": list(flags),
        "precision": precision,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _format_of(text: bytes) -> object:
    try:
        return _Header.model_validate_json(text).format
    except ValidationError:
        return None


class _Header(BaseModel):
    format: Any
