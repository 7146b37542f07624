"""From words to what the networks read: token chunks, context, and the vector.

Source: SDXL (arXiv 2307.01952) for the two towers and micro-conditioning; SPEC, "Text".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.bundle.manifest import Bundle
from engine.bundle.sdxl import MICRO_CONDITIONS, TOKENS
from engine.device.interface import Array

TOKENS_INSIDE = TOKENS - 2  # between the start and the end token

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Conditioning:
    """What text tells the networks.

    Attributes:
        context: f[77k, C] for k chunks of text, in the networks' precision; f[B, 77k, C] where photos have their own.
        vector: f[V], pooled text and micro-conditioning; f[B, V] where photos have their own.
    """

    context: NDArray[Any]
    vector: NDArray[Any]


@dataclass(frozen=True)
class SpecialIds:
    """The ids that frame a chunk and fill it up, for each of the two towers."""

    start: int
    end: int
    pad: int
    pad_2: int


class PromptTokenizer:
    """Cuts a text of any length into framed chunks of 77 tokens; nothing is dropped."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialIds) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<|endoftext|>" in a prompt is text: as a token, it would end what the second tower pools.
        self._tokenizer.encode_special_tokens = True
        self._special = special

    def count_chunks(self, text: str) -> int:
        """Return how many chunks a text fills; an empty one fills one."""
        return max(1, math.ceil(len(self._ids(text)) / TOKENS_INSIDE))

    def chunks(self, text: str, count: int) -> tuple[Ids, Ids]:
        """Return a text's chunks for the two towers.

        Args:
            text: of at most `count` chunks.
            count: how many to return; empty ones follow the text's own.
        Returns:
            i64[count, 77] twice: padded as CLIP-L, and as bigG.
        """
        ids = self._ids(text)
        rows, rows_2 = [], []
        for index in range(count):
            inside = ids[index * TOKENS_INSIDE : (index + 1) * TOKENS_INSIDE]
            framed = [self._special.start, *inside, self._special.end]
            fill = TOKENS - len(framed)
            rows.append(framed + [self._special.pad] * fill)
            rows_2.append(framed + [self._special.pad_2] * fill)
        return np.array(rows, dtype=np.int64), np.array(rows_2, dtype=np.int64)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def join_context(hidden: NDArray[Any], hidden_2: NDArray[Any]) -> NDArray[Any]:
    """Return the context f[77k, W1 + W2] of one text from the towers' hidden states, f[k, 77, W]."""
    joined = np.concatenate([hidden, hidden_2], axis=2)
    return joined.reshape(-1, joined.shape[2])


def join_vector(pooled: NDArray[Any], frequencies: Sequence[float]) -> NDArray[Any]:
    """Return the vector f[V] of one text.

    Args:
        pooled: f[W2], the pooled state of its first chunk.
        frequencies: of the sinusoids, from the bundle.
    """
    return np.concatenate([pooled, sinusoids(MICRO_CONDITIONS, frequencies).astype(pooled.dtype)])


def sinusoids(numbers: Sequence[float], frequencies: Sequence[float]) -> NDArray[np.float32]:
    """Embed each number in cosines, then sines, all numbers one after the other.

    Returns:
        f32[2 · len(frequencies) · len(numbers)].
    """
    angles = np.asarray(numbers, np.float32)[:, None] * np.asarray(frequencies, np.float32)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).reshape(-1)


#: Runs a text tower, by its graph's name, on named inputs.
RunTower = Callable[[str, Mapping[str, Array]], dict[str, Array]]


class Prompts:
    """A bundle's words: its tokenizer, and how its two towers are asked.

    Raises:
        BundleError: the tokenizer is damaged.
    """

    def __init__(self, bundle: Bundle) -> None:
        ids = bundle.manifest.tokenizer
        special = SpecialIds(ids.start_id, ids.end_id, ids.pad_id, ids.pad_id_2)
        self._tokenizer = PromptTokenizer(bundle.read_tokenizer(), special)
        self._frequencies = bundle.manifest.frequencies

    def count_chunks(self, texts: Sequence[str]) -> int:
        """Return how many chunks of 77 tokens the longest of some texts fills."""
        return max(self._tokenizer.count_chunks(text) for text in texts)

    def encode(self, texts: Sequence[str], run: RunTower) -> list[Conditioning]:
        """Return what each text tells the networks.

        Args:
            texts: from `texts_of`.
            run: runs `text_encoder` and `text_encoder_2` on `input_ids` i64[texts · k, 77].
        Returns:
            One for each text; contexts are of one length.
        """
        count = self.count_chunks(texts)
        pairs = [self._tokenizer.chunks(text, count) for text in texts]
        ids, ids_2 = (np.concatenate(part) for part in zip(*pairs, strict=True))
        hidden = run("text_encoder", {"input_ids": ids})["hidden"]
        second = run("text_encoder_2", {"input_ids": ids_2})
        hidden_2, pooled = second["hidden"], second["pooled"]
        found = []
        for index in range(len(texts)):
            part = slice(index * count, (index + 1) * count)
            vector = join_vector(pooled[index * count], self._frequencies)
            found.append(Conditioning(join_context(hidden[part], hidden_2[part]), vector))
        return found
