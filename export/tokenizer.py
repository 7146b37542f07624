"""The bundle's vocabulary: any CLIP tokenizer folder as one `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from engine.errors import CheckpointError

FILE = "tokenizer.json"
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
#: bigG pads with the first token of the vocabulary, CLIP-L with the end token (SPEC, "Text").
PAD_ID_2 = 0


def find_tokenizer(folder: Path) -> Path:
    """Return the folder itself or its `tokenizer/`, whichever holds a vocabulary.

    Raises:
        CheckpointError: neither does.
    """
    for candidate in (folder, folder / "tokenizer"):
        if any((candidate / name).is_file() for name in (FILE, "vocab.json")):
            return candidate
    raise CheckpointError(
        "no tokenizer here",
        where=folder,
        expected="tokenizer.json, or vocab.json and merges.txt",
        fix="give CLIP's tokenizer folder with --tokenizer, such as `tokenizer/` of a diffusers SDXL folder",
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a CLIP vocabulary.

    Raises:
        CheckpointError: damaged, or without CLIP's start and end tokens.
    """
    folder = find_tokenizer(folder)
    try:
        if (folder / FILE).is_file():
            tokenizer = Tokenizer.from_file(str(folder / FILE))
        else:
            from transformers import CLIPTokenizer

            tokenizer = CLIPTokenizer(
                vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
            ).backend_tokenizer
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError("the tokenizer is damaged", where=folder, found=str(error)[:200]) from error
    for token in (START_TOKEN, END_TOKEN):
        if tokenizer.token_to_id(token) is None:
            raise CheckpointError("not a CLIP tokenizer", where=folder, expected=f"a token {token}")
    return tokenizer
