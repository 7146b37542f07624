"""A bundle's tokenizer: CLIP's, which is byte-pair encoding behind two fixed patterns.

`tokenizer.json` can describe much more: patterns that never end, replacements that grow a text a thousandfold. So what
stands in it besides the vocabulary is compared with CLIP's own before the library sees it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from engine.errors import BundleError

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
#: How CLIP cuts a text into words, before bytes and merges (arXiv 2103.00020 and its published vocabulary).
CLIP_WORDS = rf"<\|startoftext\|>|<\|endoftext\|>|{_WORDS}"
#: Patterns of CLIP's tokenizers: spaces, and words with the framing tokens or, in older files, without them.
_PATTERNS = (r"\s+", _WORDS, CLIP_WORDS)
_STEPS = ("Sequence", "NFC", "Lowercase", "Replace", "Split", "ByteLevel", "RobertaProcessing", "TemplateProcessing")


def read_tokenizer(content: bytes, where: object) -> Tokenizer:
    """Return the tokenizer that a `tokenizer.json` describes.

    Args:
        content: of the file.
        where: it is, for errors.
    Raises:
        BundleError: it is damaged, or no tokenizer of CLIP's kind.
    """
    try:
        described = json.loads(content)
        problem = next(_problems(described), None)
        if problem is None:
            return Tokenizer.from_str(content.decode())
    except (KeyboardInterrupt, MemoryError):
        raise
    # tokenizers raises plain Exception, and a panic of its library is no Exception at all.
    except BaseException as error:
        raise BundleError("the tokenizer is damaged", where=where, found=str(error)[:200]) from error
    raise BundleError(
        "not CLIP's kind of tokenizer",
        where=where,
        expected="byte-pair encoding of CLIP's words",
        found=problem,
        fix="use a bundle from somebody you trust; or build one, with CLIP's own tokenizer",
    )


def _problems(described: dict[str, Any]) -> Iterator[str]:
    if described["model"].get("type", "BPE") != "BPE" or described["model"].get("dropout"):
        yield f"a model of type {described['model'].get('type')!r:.50}"
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        for step in _steps(described.get(part)):
            if step.get("type") not in _STEPS:
                yield f"{part}: {step.get('type')!r:.50}"
            pattern = step.get("pattern", {"Regex": _WORDS})
            if pattern.get("Regex") not in _PATTERNS or step.get("content", " ") != " ":
                yield f"{part}: {pattern!r:.100}"


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield a step of text, and those that it is made of."""
    if step is not None:
        yield step
        for part in (*step.get("normalizers", ()), *step.get("pretokenizers", ()), *step.get("processors", ())):
            yield from _steps(part)
