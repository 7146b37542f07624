"""From settings to what the networks read of their texts.

Source: SPEC, "Text"; the towers themselves are run by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engine.bundle import Bundle
from engine.conditioning import Conditioning, PromptTokenizer, SpecialIds, join_context, join_vector
from engine.device import Array
from engine.guidance import is_unguided
from engine.settings import Settings

#: Runs a text tower, by its graph's name, on named inputs.
RunTower = Callable[[str, Mapping[str, Array]], dict[str, Array]]


def texts_of(settings: Settings) -> tuple[str, ...]:
    """Return the positive and the negative text, or the positive alone where no step is guided."""
    positive = ", ".join(text for text in (settings.prompt, settings.quality_words) if text)
    unguided = all(is_unguided(scale) for scale in settings.cfg_scale)
    return (positive,) if unguided else (positive, settings.negative_prompt)


class Prompts:
    """A bundle's words: its tokenizer, and how its two towers are asked.

    Raises:
        BundleError: the tokenizer is damaged.
    """

    def __init__(self, bundle: Bundle) -> None:
        ids = bundle.manifest.tokenizer
        special = SpecialIds(ids.start_id, ids.end_id, ids.pad_id, ids.pad_id_2)
        self._tokenizer = PromptTokenizer(bundle.file(ids.file), special)
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
