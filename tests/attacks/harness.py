"""Fuzzing of every reader of foreign bytes (see `readers`), each in a process of its own with bounds.

python tests/attacks/harness.py BUNDLE --inputs 20000            changed at random, from a seed
python tests/attacks/harness.py BUNDLE --guided 60 --only NAME   by coverage, with atheris: seconds for a reader
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), str(Path(__file__).parent)]

#: Of the suite, and of `make attack` where no other is given.
SEED = 20261129
#: What one input may take. Readers take milliseconds; a busy computer makes seconds of them.
MOST_SECONDS = 20
#: What a process may hold beside what it had when it began, and of addresses in all.
MOST_BYTES, MOST_ADDRESSES = 600 << 20, 8 << 30
_ODD_VALUES: tuple[Any, ...] = (None, True, 0, -1, 1 << 31, 1 << 63, 10**400, 1e308, 1e-320, "", "../x", "a\0b", [], {})


@dataclass
class Row:
    """What came of fuzzing a reader.

    Attributes:
        reader: its name.
        inputs: that were read.
        accepted, refused: of them.
        seconds: of the slowest one.
        mebibytes: that the process held at most beside what it began with.
        exit_code: of the process; negative for a signal.
        problem: what was neither accepted nor refused, or the input at which the process ended.
    """

    reader: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    mebibytes: int = 0
    exit_code: int = 0
    problem: str | None = None

    @property
    def is_bad(self) -> bool:
        return bool(self.problem or self.exit_code or self.mebibytes << 20 > MOST_BYTES)


# -- changes -----------------------------------------------------------------------------------------------


def changed(good: bytes, rng: random.Random) -> bytes:
    """Return an example with a few changes: of bytes, most of them near its head, or of one value of its JSON."""
    if good[:1] == b"{" and rng.random() < 0.5:
        return _other_json(good, rng)
    data = bytearray(good)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        end = len(data) if rng.random() < 0.5 else min(len(data), 400)
        place, kind = rng.randrange(max(1, end)), rng.random()
        if kind < 0.5:
            data[place : place + 1] = bytes([rng.choice([0, 1, 127, 255, rng.randrange(256)])])
        elif kind < 0.6 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif kind < 0.7:
            width = rng.choice([1, 2, 4, 8])
            data[place : place + width] = rng.choice([b"\xff", b"\0", rng.randbytes(1)]) * width
        elif kind < 0.8:
            del data[place : place + rng.choice([1, 2, 4, 8, 20])]
        elif kind < 0.95:
            data[place:place] = data[place : place + rng.randrange(1, 20)] or rng.randbytes(4)
        else:
            del data[place:]
        if not data:
            break
    return bytes(data)


def _other_json(good: bytes, rng: random.Random) -> bytes:
    """Return JSON with one value replaced, left out, repeated or nested."""
    value = json.loads(good)
    holder, key = value, None
    while isinstance(holder, (dict, list)) and holder:
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < 0.2:
            break
        holder = holder[key]
    kind = rng.random()
    if kind < 0.7:
        holder[key] = rng.choice(_ODD_VALUES)
    elif kind < 0.8:
        del holder[key]
    elif kind < 0.9:
        holder[key] = [holder[key]] * rng.choice([2, 100])
    else:
        return json.dumps(value).encode().replace(b"}", b"," * rng.randrange(2) + b"}" * rng.randrange(3), 1)
    return json.dumps(value).encode()


# -- one reader, in a process of its own --------------------------------------------------------------------


def attack(reader: Any, numbers: Sequence[int], seed: int) -> Row:
    """Read changed examples in a fork of this process; what ends or hangs it is told with the number of the input."""
    with tempfile.TemporaryDirectory() as folder:  # of this process, which outlives the other
        return _attack(reader, numbers, seed, Path(folder))


def _attack(reader: Any, numbers: Sequence[int], seed: int, folder: Path) -> Row:
    row = Row(reader.name)
    shared = mmap.mmap(-1, 64)
    ends, begins = os.pipe()
    child = os.fork()
    if not child:
        status = 70
        try:
            os.close(ends)
            _bound()
            signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
            _read_all(reader, numbers, seed, row, shared, folder)
            os.write(begins, json.dumps(asdict(row)).encode()[:60_000])
            status = 0
        finally:
            os._exit(status)
    os.close(begins)
    told = b""
    while part := os.read(ends, 1 << 16):
        told += part
    os.close(ends)
    _, code, usage = os.wait4(child, 0)
    held, number = struct.unpack_from("qq", shared)
    row = Row(**json.loads(told)) if told else row
    row.exit_code = os.waitstatus_to_exitcode(code)
    ended = row.exit_code != 0 or not told
    row.mebibytes = max(0, usage.ru_maxrss - held) >> 10
    if ended:
        row.problem = row.problem or f"ended by {row.exit_code} at input {number}"
    return row


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # so that what does not return is ended, too
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)


def _read_all(reader: Any, numbers: Sequence[int], seed: int, row: Row, shared: mmap.mmap, folder: Path) -> None:
    from readers import REFUSALS

    good = reader.example()
    try:  # or nothing below would show anything; it loads libraries, too
        reader.read(reader.wrap(good), folder)
    except BaseException as error:
        row.problem = f"the good example: {type(error).__name__}: {str(error)[:300]}"
        return
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        struct.pack_into("qq", shared, 0, held, number)
        data = reader.wrap(changed(good, random.Random(f"{seed} {reader.name} {number}")))
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        started = time.perf_counter()
        try:
            reader.read(data, folder)
            row.accepted += 1
        except REFUSALS:
            row.refused += 1
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            row.problem = row.problem or f"input {number}: {type(error).__name__} at {where}: {str(error)[:150]}"
        row.seconds = max(row.seconds, round(time.perf_counter() - started, 3))
        row.inputs += 1
    signal.setitimer(signal.ITIMER_REAL, 0)


# -- by coverage ----------------------------------------------------------------------------------------------


def guided(bundle: Path, name: str, seconds: int) -> None:
    """Fuzz one reader with atheris, which prefers inputs that reach new code; what it finds ends the process."""
    import atheris

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        with atheris.instrument_imports(include=["engine", "export", "triton_repo"]):
            import readers

            (reader,) = (each for each in readers.all_readers(bundle) if each.name == name)
            good = reader.example()
            reader.read(reader.wrap(good), Path(folder))  # imports what is imported where it is used
        (corpus / "good").write_bytes(good)

        def one(data: bytes) -> None:
            with contextlib.suppress(*readers.REFUSALS):
                reader.read(reader.wrap(data), Path(folder))

        bounds = [
            f"-max_total_time={seconds}",
            f"-timeout={MOST_SECONDS}",
            f"-rss_limit_mb={2048 + (MOST_BYTES >> 20)}",
        ]
        atheris.Setup([sys.argv[0], *bounds, f"-seed={SEED}", str(corpus)], one)
        atheris.Fuzz()


# -- the command -----------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("bundle", type=Path, help="a good bundle")
    parser.add_argument("--inputs", type=int, default=20_000, help="over all readers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", help="the reader of this name")
    parser.add_argument("--guided", type=int, metavar="SECONDS", help="by coverage, with atheris; needs --only")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args()
    if options.guided:
        guided(options.bundle, options.only, options.guided)
        return 0
    from readers import all_readers

    chosen = [reader for reader in all_readers(options.bundle) if options.only in (None, reader.name)]
    share = -(-options.inputs // len(chosen))
    rows = []
    for reader in chosen:
        rows.append(attack(reader, range(share), options.seed))
        if not options.json:
            print(_line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    return int(any(row.is_bad for row in rows))


def _line(row: Row) -> str:
    counts = f"{row.inputs:6} inputs {row.accepted:6} accepted {row.refused:6} refused"
    return (
        f"{row.reader:24} {counts} {row.seconds:7.3f} s {row.mebibytes:4} MiB exit {row.exit_code} {row.problem or ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
