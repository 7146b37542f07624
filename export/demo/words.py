"""The demo's text: its vocabulary, and what is said of the pictures that it is trained on.

The vocabulary was learned once, `python -m export.demo.words FILE`, and is kept: the trainer of
`tokenizers` breaks ties by a hash map's order, so that every run numbers some tokens otherwise.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from engine.bundle.sdxl import TOKENS
from engine.pipeline.text import TOKENS_INSIDE
from engine.settings import NEGATIVE_WORDS, QUALITY_WORDS
from export.checkpoint.tokenizer import END_TOKEN, FILE, PAD_ID_2, START_TOKEN, clip_tokenizer
from export.demo import files

#: Common words of captions, so that they are single tokens.
MERGE_WORDS = (
    "a an the of in on at with and by under over near beside photo photograph picture image portrait landscape "
    "shapes text face woman man child people person eyes hair skin smile hand city street house window wall "
    "road car train bridge river lake sea beach mountain hill forest tree trees leaf flower grass field sky "
    "cloud sun moon night day snow rain fog light shadow dog cat bird horse animal food table book "
    "old young red green blue yellow black white grey brown small large wooden stone glass metal water"
)
_NO_TEXT, _CAPTION, _WORDS = 0.1, 0.3, 0.55  # cumulative shares of what stands beside a clean picture


def demo_tokenizer() -> Tokenizer:
    """Return the vocabulary that the demo was trained with."""
    return Tokenizer.from_file(str(files.TOKENIZER / FILE))


def learn_tokenizer(start_id: int | None = None) -> Tokenizer:
    """Return a byte-level vocabulary in CLIP's form, with merges learned from our own words.

    Any text has tokens in it; the project's quality words fit into one chunk.

    Args:
        start_id: of the start token, the end token's is one more; None puts them behind all others.
    """
    # Every printable byte symbol, alone and at the end of a word, then what training merges.
    base = clip_tokenizer({START_TOKEN: 0, END_TOKEN: 1}, [])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = base.normalizer, base.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([QUALITY_WORDS, NEGATIVE_WORDS, MERGE_WORDS], trainer)
    model = json.loads(learner.to_str())["model"]
    ordered = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    known = set(ordered)
    ordered += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in known]
    if start_id is None:
        start_id = len(ordered)
    ids = {token: index for index, token in enumerate(ordered)}
    merges = [tuple(merge) for merge in model["merges"]]
    return clip_tokenizer(ids | {START_TOKEN: start_id, END_TOKEN: start_id + 1}, merges)


def prompt_for(caption: str, rng: np.random.Generator) -> str:
    """Return what is said of a clean picture: nothing, its caption, the quality words, or both."""
    dice = rng.random()
    if dice < _NO_TEXT:
        return ""
    if dice < _CAPTION:
        return caption
    return QUALITY_WORDS if dice < _WORDS else f"{caption}, {QUALITY_WORDS}"


def token_rows(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the first chunk of each text for the two towers, i64[B, 77] each."""
    start, end = tokenizer.token_to_id(START_TOKEN), tokenizer.token_to_id(END_TOKEN)
    rows, rows_2 = [], []
    for text in texts:
        framed = [start, *tokenizer.encode(text, add_special_tokens=False).ids[:TOKENS_INSIDE], end]
        fill = TOKENS - len(framed)
        rows.append(framed + [end] * fill)
        rows_2.append(framed + [PAD_ID_2] * fill)
    return torch.tensor(rows), torch.tensor(rows_2)


if __name__ == "__main__":
    learn_tokenizer().save(sys.argv[1])
