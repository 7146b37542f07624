"""Make the traces that ship with the project, or those of your own architecture: `python -m export.graphs.make_traces`.

Each graph is traced, packed with random weights, and compared with its torch module; the trace is written with the
figure. For SDXL's size that takes about half an hour on two cores, 16 GB of memory and 30 GB of disk.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from engine.bundle.graphspec import PRECISION_DTYPES
from engine.bundle.verification import Agreement
from engine.cli.console import run_command
from engine.cli.options import command_parser
from engine.errors import UsageError
from engine.memory.host_memory import release_free_memory, return_large_blocks_at_once
from export.build.trial import try_graph
from export.build.verify import compare_with_torch
from export.build.weights import WEIGHTS, Weight, plan_layout, write_weights
from export.checkpoint.tensor_files import LazyTensor
from export.graphs.builder import GraphBuilder
from export.graphs.definitions import GraphDefinition
from export.graphs.pack import pack
from export.graphs.to_onnx import trace
from export.graphs.traces import (
    ARCHITECTURE,
    PRECISIONS,
    SHIPPED,
    Trace,
    cached_trace,
    read_architecture,
    trace_file,
    trace_key,
    write_trace,
)


def main(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where it fails."""
    parser = command_parser("python -m export.graphs.make_traces", __doc__)
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="DIR",
        help=f"with an {ARCHITECTURE} each; default: those that ship, in {SHIPPED}",
    )
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="only this one; repeatable")
    parser.add_argument("--all", action="store_true", help="also traces that are as this code makes them")
    options = parser.parse_args(arguments)
    return_large_blocks_at_once()
    for folder in options.folders or sorted(file.parent for file in SHIPPED.glob(f"*/{ARCHITECTURE}")):
        if not (folder / ARCHITECTURE).is_file():
            raise UsageError("no architecture here", where=folder, expected=ARCHITECTURE)
        known = read_architecture(folder / ARCHITECTURE)
        for definition in known.definitions(options.precision or PRECISIONS):
            target = trace_file(folder, definition)
            if options.all or not _is_current(target, definition):
                made = make_verified_trace(definition)
                write_trace(made, target)
                assert made.provenance.agreement is not None
                worst = made.provenance.agreement.worst
                print(f"{target}: {target.stat().st_size:,} bytes, agrees with torch to {worst:.1e}", flush=True)
    return 0


def make_verified_trace(definition: GraphDefinition) -> Trace:
    """Return the trace of a graph, with its agreement with torch on random weights.

    Raises:
        BuildError: it disagrees.
    """
    builder = GraphBuilder(definition)
    made = trace(builder)
    with tempfile.TemporaryDirectory() as folder:
        agreement = _agreement(builder, made, Path(folder))
    release_free_memory()
    return Trace(made.structure, made.provenance.model_copy(update={"agreement": agreement}))


def _agreement(builder: GraphBuilder, made: Trace, folder: Path) -> Agreement:
    dtype = PRECISION_DTYPES[builder.spec.precision]
    layout = plan_layout([Weight(name, dtype, shape) for name, shape in builder.parameters.items()])
    write_weights(folder / WEIGHTS, layout, _random_weights(builder), [])
    file = folder / f"{builder.spec.name}.onnx"
    onnx.save(pack(made.structure, builder.spec, layout.weights), file)
    run = try_graph(builder.definition, file)
    agreement, _ = compare_with_torch(builder, file, run, "random weights")
    return agreement


def _random_weights(builder: GraphBuilder) -> dict[str, LazyTensor]:
    """Return weights with which values neither die out nor grow: of unit gain, norms about 1, small biases."""

    def draw(number: int, name: str, shape: tuple[int, ...]) -> LazyTensor:
        def read() -> np.ndarray:
            values = np.random.default_rng([7, number]).standard_normal(shape, np.float32)
            if len(shape) > 1:
                return values / np.float32(np.sqrt(np.prod(shape[1:])))
            return np.float32(name.endswith("weight")) + np.float32(0.1) * values

        return LazyTensor(name, Path("random"), shape, read)

    return {name: draw(number, name, shape) for number, (name, shape) in enumerate(builder.parameters.items())}


def _is_current(file: Path, definition: GraphDefinition) -> bool:
    found = cached_trace(file)
    return found is not None and found.provenance.key == trace_key(definition)


if __name__ == "__main__":
    sys.exit(run_command(main))
