"""The few instructions of Python's pickles that a dictionary of tensors needs, and no others.

This is no subclass of `pickle.Unpickler`, because restricting the names that a pickle may use does
not make that safe. With every name refused, Python's own unpickler still takes 8 GB for eight bytes
(an entry of the memo with a high number), and a megabyte crashes the process (the hash of a deep
tuple). torch's `weights_only` has its own interpreter for the same reason.

Here, nothing is imported, nothing that a pickle names is called, and no object has attributes that
a pickle could set. Time and memory are bounded by the number of instructions.
"""

from __future__ import annotations

import pickle  # for the names of the instructions alone
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from engine.errors import CheckpointError
from export.checkpoint.mapped import DOWNLOAD_AGAIN, shorten

#: A tensor takes about 45 instructions and 200 bytes, so both suffice for 30,000.
MOST_BYTES = 1 << 23
_MOST_INSTRUCTIONS = 1_500_000


@dataclass(frozen=True)
class Function:
    """What stands for a function that a pickle may name: our own, with the same arguments."""

    call: Callable[[tuple[Any, ...]], object]


def refuse(found: str) -> NoReturn:
    """Raise the error for a pickle that needs more than tensors do."""
    raise CheckpointError(
        "the pickle holds more than tensors, so it is not loaded: it could run any code",
        expected="a dictionary of tensors",
        found=shorten(found),
        fix="convert it to .safetensors where you trust it",
    )


def damaged(found: str) -> NoReturn:
    """Raise the error for a pickle that cannot be what was written."""
    raise CheckpointError("not a whole checkpoint", found=shorten(found), fix=DOWNLOAD_AGAIN)


def load_state_pickle(
    data: bytes, find_global: Callable[[str], object], find_storage: Callable[[object], object]
) -> object:
    """Return what a pickle describes, of dictionaries, lists, tuples, text, numbers and what `find_…` return.

    Args:
        data: the pickle, of protocol 2 to 5.
        find_global: returns what stands for "module.name", or raises.
        find_storage: returns what stands for a persistent id, or raises.

    Raises:
        CheckpointError: damaged, too long, or a pickle that needs more than this.
    """
    if len(data) > MOST_BYTES:
        damaged(f"a pickle of more than {MOST_BYTES} bytes beside the tensors")
    machine = _Machine(data, find_global, find_storage)
    try:
        return machine.run()
    except (IndexError, KeyError):
        damaged(f"the pickle uses what it never made, at byte {machine.at}")
    except (struct.error, UnicodeDecodeError) as error:
        damaged(f"{error}, at byte {machine.at}")


class _Machine:
    """A pickle's stack and memo, and one method for each instruction that it may use."""

    def __init__(
        self, data: bytes, find_global: Callable[[str], object], find_storage: Callable[[object], object]
    ) -> None:
        self.data = data
        self.at = 0
        self.find_global = find_global
        self.find_storage = find_storage
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        for _ in range(_MOST_INSTRUCTIONS):
            code = self.take(1)[0]
            if code == pickle.STOP[0]:
                return self.stack.pop()
            if code not in _INSTRUCTIONS:
                if code not in _NAMES:
                    damaged(f"the pickle has byte {code:#04x} where an instruction should be")
                refuse(f"the instruction {_NAMES[code]}")
            _INSTRUCTIONS[code](self)
        damaged(f"a pickle of more than {_MOST_INSTRUCTIONS} instructions")

    def take(self, size: int) -> bytes:
        taken = self.data[self.at : self.at + size]
        if len(taken) < size:
            damaged("the pickle ends early")
        self.at += size
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def protocol(self) -> None:
        if self.take(1)[0] > pickle.HIGHEST_PROTOCOL:
            damaged("a pickle of an unknown protocol")

    def frame(self) -> None:
        self.number("<Q")  # a hint for buffers

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def text(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)).decode())

    def long(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.number("B")), "little", signed=True))

    def push_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError
        self.stack[-size:] = [tuple(self.stack[-size:])]

    def tuple_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            refuse(f"items for what is no list, but {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            refuse(f"entries for what is no dictionary, but {type(target).__name__}")
        if len(items) % 2:
            damaged("a key without a value in the pickle")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of a tuple can take forever, or overflow the stack; and numbers of more bits
            # can be chosen to have one hash, which makes a dictionary quadratic.
            if type(key) is not str and not (type(key) is int and -(2**63) <= key < 2**63):
                refuse(f"a key that is no text, but {type(key).__name__}")
            target[key] = value

    def one(self) -> list[Any]:
        return [self.stack.pop()]

    def two(self) -> list[Any]:
        value = self.stack.pop()
        return [self.stack.pop(), value]

    def named(self) -> None:
        names = []
        for _ in range(2):
            end = self.data.find(b"\n", self.at)
            if end < 0:
                damaged("the pickle ends early")
            names.append(self.take(end - self.at).decode())
            self.at += 1
        self.stack.append(self.find_global(".".join(names)))

    def named_by_stack(self) -> None:
        module, name = self.two()
        if type(module) is not str or type(name) is not str:
            damaged("a name in the pickle is no text")
        self.stack.append(self.find_global(f"{module}.{name}"))

    def reduce(self) -> None:
        function, arguments = self.two()
        if type(function) is not Function:
            refuse(f"a call of what is no function, but {type(function).__name__}")
        if type(arguments) is not tuple:
            damaged("a call without arguments in the pickle")
        self.stack.append(function.call(arguments))

    def build(self) -> None:
        """Leave attributes out: a module's `state_dict` has `_metadata`, of no use to us."""
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            refuse(f"attributes of {type(self.stack[-1]).__name__}")

    def persistent(self) -> None:
        self.stack.append(self.find_storage(self.stack.pop()))


_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_INSTRUCTIONS: dict[int, Callable[[_Machine], object]] = {
    code[0]: step
    for code, step in {
        pickle.PROTO: _Machine.protocol,
        pickle.FRAME: _Machine.frame,
        pickle.MARK: _Machine.mark,
        pickle.NONE: lambda m: m.stack.append(None),
        pickle.NEWTRUE: lambda m: m.stack.append(True),
        pickle.NEWFALSE: lambda m: m.stack.append(False),
        pickle.BININT: lambda m: m.stack.append(m.number("<i")),
        pickle.BININT1: lambda m: m.stack.append(m.number("B")),
        pickle.BININT2: lambda m: m.stack.append(m.number("<H")),
        pickle.LONG1: _Machine.long,
        pickle.BINFLOAT: lambda m: m.stack.append(m.number(">d")),
        pickle.SHORT_BINUNICODE: lambda m: m.text("B"),
        pickle.BINUNICODE: lambda m: m.text("<I"),
        pickle.BINUNICODE8: lambda m: m.text("<Q"),
        pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
        pickle.TUPLE1: lambda m: m.push_tuple(1),
        pickle.TUPLE2: lambda m: m.push_tuple(2),
        pickle.TUPLE3: lambda m: m.push_tuple(3),
        pickle.TUPLE: _Machine.tuple_since_mark,
        pickle.EMPTY_LIST: lambda m: m.stack.append([]),
        pickle.APPEND: lambda m: m.append(m.one()),
        pickle.APPENDS: lambda m: m.append(m.since_mark()),
        pickle.EMPTY_DICT: lambda m: m.stack.append({}),
        pickle.SETITEM: lambda m: m.set_items(m.two()),
        pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
        pickle.BINPUT: lambda m: m.put(m.number("B")),
        pickle.LONG_BINPUT: lambda m: m.put(m.number("<I")),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.BINGET: lambda m: m.get(m.number("B")),
        pickle.LONG_BINGET: lambda m: m.get(m.number("<I")),
        pickle.GLOBAL: _Machine.named,
        pickle.STACK_GLOBAL: _Machine.named_by_stack,
        pickle.REDUCE: _Machine.reduce,
        pickle.BUILD: _Machine.build,
        pickle.BINPERSID: _Machine.persistent,
    }.items()
}
