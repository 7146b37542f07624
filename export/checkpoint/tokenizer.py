"""The bundle's vocabulary: any CLIP tokenizer folder as one `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.bundle.files import read_bounded
from engine.bundle.tokenizer import CLIP_WORDS, read_tokenizer
from engine.errors import BundleError, CheckpointError
from export.checkpoint.small_files import read_object, read_small_text

FILE = "tokenizer.json"
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
#: bigG pads with the first token of the vocabulary, CLIP-L with the end token (SPEC, "Text").
PAD_ID_2 = 0


def tokenizer_place(named: Path | None, sdxl: Path) -> Path:
    """Return the folder in which a command looks for the tokenizer: the one that was named, or the base's own.

    Args:
        named: by the user.
        sdxl: the base, one file or a diffusers folder.
    Raises:
        CheckpointError: none was named, and a single file holds none.
    """
    if named is None and not sdxl.is_dir():
        raise CheckpointError(
            "a single file holds no tokenizer",
            where=sdxl,
            fix="give CLIP's tokenizer folder with --tokenizer, such as `tokenizer/` of a diffusers SDXL folder",
        )
    return sdxl if named is None else named


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
        CheckpointError: damaged, of another kind than CLIP's, or without its start and end tokens.
    """
    folder = find_tokenizer(folder)
    try:
        if (folder / FILE).is_file():
            tokenizer = read_tokenizer(read_bounded(folder / FILE), folder / FILE)
        else:
            vocabulary = read_object(folder / "vocab.json", "the tokenizer is damaged", "tokens and their ids")
            tokenizer = clip_tokenizer(vocabulary, _read_merges(folder / "merges.txt"))
    except BundleError as error:  # the engine would refuse it in the bundle
        raise CheckpointError(
            error.problem,
            where=error.where,
            expected=error.expected,
            found=error.found,
            fix="give CLIP's tokenizer with --tokenizer, such as `tokenizer/` of a diffusers SDXL folder",
        ) from error
    except (KeyboardInterrupt, MemoryError, CheckpointError):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and a panic of its library is none at all
        raise CheckpointError("the tokenizer is damaged", where=folder, found=str(error)[:200]) from error
    for token in (START_TOKEN, END_TOKEN):
        if tokenizer.token_to_id(token) is None:
            raise CheckpointError("not a CLIP tokenizer", where=folder, expected=f"a token {token}")
    return tokenizer


def check_vocabulary(folder: Path, tokenizer: Tokenizer, rows: Iterable[int]) -> None:
    """Check that a vocabulary is the one that text towers were trained with, as far as their tables tell.

    The end token is CLIP's last one, and its place is where bigG is pooled. Behind it there may only be tokens that
    were added later, each with a row of its own.

    Args:
        folder: of the tokenizer, for the error.
        tokenizer: from `load_tokenizer`.
        rows: of each tower's table of embeddings.
    Raises:
        CheckpointError: the vocabulary is another one.
    """
    entries, own = (set(tokenizer.get_vocab(with_added_tokens=added).values()) for added in (True, False))
    end = tokenizer.token_to_id(END_TOKEN)
    assert end is not None  # `load_tokenizer` has seen to it
    fix = "give the tokenizer that belongs to the base with --tokenizer, such as `tokenizer/` of its diffusers folder"
    for table in rows:
        if max(entries) >= table:
            raise CheckpointError(
                "the tokenizer has tokens that the text towers lack",
                where=folder,
                expected=f"ids below {table}",
                found=f"ids up to {max(entries)}",
                fix=fix,
            )
        behind = set(range(end + 1, table))
        if behind - entries or behind & (own - {end}):
            raise CheckpointError(
                "the tokenizer is not that of the text towers: its end token is not their last",
                where=folder,
                expected=f"{table} entries, of which {END_TOKEN} is {table - 1}",
                found=f"{len(entries)} entries, of which {END_TOKEN} is {end}",
                fix=fix,
            )


def clip_tokenizer(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Return CLIP's tokenizer of a vocabulary: lower case, words, bytes, merges, framed by start and end.

    Args:
        vocabulary: tokens and their ids; `START_TOKEN` and `END_TOKEN` among them.
        merges: pairs of tokens, the first merged first.
    Raises:
        KeyError: a start or end token is missing.
    """
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocabulary),
            list(merges),
            unk_token=END_TOKEN,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    start, end = (START_TOKEN, vocabulary[START_TOKEN]), (END_TOKEN, vocabulary[END_TOKEN])
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([START_TOKEN, END_TOKEN])
    return tokenizer


def _read_merges(file: Path) -> list[tuple[str, str]]:
    """Return the pairs of a merges.txt, whose first line may name its version."""
    lines = read_small_text(file).split("\n")
    if lines and lines[0].startswith("#version"):
        del lines[0]
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip()]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"{file.name}: not two tokens: {' '.join(pair)[:40]}")
    return [(first, second) for first, second in pairs]
