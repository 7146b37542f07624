import json

import numpy as np
import pytest
from golden import assert_golden, in_the_last_bit_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.bundle.sdxl import MICRO_CONDITIONS, TOKENS
from engine.bundle.tokenizer import read_tokenizer
from engine.errors import BundleError
from engine.pipeline.text import (
    PromptTokenizer,
    SpecialIds,
    join_context,
    join_vector,
    sinusoids,
)
from export.checkpoint.architecture import sinusoid_frequencies

SPECIAL = SpecialIds(start=1000, end=1001, pad=1001, pad_2=0)


@pytest.fixture(scope="module")
def tokenizer():
    """A vocabulary of the words w0 … w999, with ids to match."""
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.enable_truncation(10)  # a file may say so; a prompt is cut all the same nowhere
    plain.enable_padding(length=20)
    return PromptTokenizer(plain, SPECIAL)


def words(count):
    return " ".join(f"w{1 + i % 999}" for i in range(count))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400), st.integers(0, 2))
def test_no_token_of_a_prompt_is_dropped(tokenizer, count, spare):
    chunks = tokenizer.count_chunks(words(count)) + spare
    ids, ids_2 = tokenizer.chunks(words(count), chunks)
    assert ids.shape == ids_2.shape == (chunks, TOKENS)
    inside = [token for row in ids for token in row[1:] if token < 1000]
    assert inside == [1 + i % 999 for i in range(count)]


@pytest.mark.parametrize(("count", "chunks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_chunk_holds_75_tokens(tokenizer, count, chunks):
    assert tokenizer.count_chunks(words(count)) == chunks


def test_chunks_are_framed_and_padded_as_each_tower_expects(tokenizer):
    ids, ids_2 = tokenizer.chunks("w5 w6", 2)
    assert ids[0, :4].tolist() == ids_2[0, :4].tolist() == [1000, 5, 6, 1001]
    assert set(ids[0, 4:]) == {1001}
    assert set(ids_2[0, 4:]) == {0}
    assert ids[1, :2].tolist() == ids_2[1, :2].tolist() == [1000, 1001]  # an empty chunk is framed too


def test_vector_matches_reference(reference):
    frequencies = sinusoid_frequencies(256).tolist()
    reference_s = in_the_last_bit_of(frequencies, reference["text/vector"][0])
    vectors = np.stack([join_vector(pooled, reference_s) for pooled in reference["text/pooled"]])
    assert_golden(vectors, reference["text/vector"], 2e-6)


def test_context_joins_towers_and_chunks():
    hidden = np.arange(2 * TOKENS * 3).reshape(2, TOKENS, 3)
    hidden_2 = -np.arange(2 * TOKENS * 5).reshape(2, TOKENS, 5)
    context = join_context(hidden, hidden_2)
    assert context.shape == (2 * TOKENS, 8)
    assert context[TOKENS + 4].tolist() == [*hidden[1, 4], *hidden_2[1, 4]]


def test_sinusoids_hold_cosines_before_sines():
    values = sinusoids((0.0, 2.0), (1.0, 0.5))
    assert np.allclose(values, [1, 1, 0, 0, np.cos(2), np.cos(1), np.sin(2), np.sin(1)])
    assert len(MICRO_CONDITIONS) == 6


def test_damaged_tokenizer_is_named(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json: the tokenizer is damaged"):
        read_tokenizer(file.read_bytes(), file)


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "A " * 1000}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "(a|a)*b"}}]}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"model": None},
        {"added_tokens": "all"},
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_before_the_library_runs_it(demo_bundle, changes):
    """A pattern that never ends, a text that grows a thousandfold, models that panic."""
    content = (demo_bundle / "tokenizer.json").read_bytes()
    assert read_tokenizer(content, "t").encode("a cat").ids
    with pytest.raises(BundleError, match="tokenizer"):
        read_tokenizer(json.dumps({**json.loads(content), **changes}).encode(), "t")
