"""Text pieces against the text of the whole: any cut of the input gives the same output."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from orchestrator.ingress.detokenizer import Detokenizer, WindowDetokenizer
from orchestrator.ingress.stops import StopMatcher
from orchestrator.ingress.text import TextRules, TextStream
from orchestrator.ingress.tokenizer import ByteTokenizer, FileTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. def average(numbers): return sum(numbers) / len(numbers)",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Déjà vu, naïve façade.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "日本語の文章。 \U0001f600\U0001f680\U0001f468\u200d\U0001f469\u200d\U0001f467",
] * 20
SPECIAL = ["<|im_start|>", "<|im_end|>"]


@cache
def byte_level() -> FileTokenizer:
    """A small byte-level BPE, trained here."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["\N{SNOWMAN}word"])
    return FileTokenizer(tokenizer.to_str())


@cache
def metaspace() -> FileTokenizer:
    """A small SentencePiece-like BPE with byte fallback."""
    tokenizer: Any = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *SPECIAL, *[f"<0x{b:02X}>" for b in range(256)]], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    definition = json.loads(tokenizer.to_str())
    # Byte tokens are ordinary tokens of the vocabulary in the published files, not special ones.
    definition["added_tokens"] = [t for t in definition["added_tokens"] if not t["content"].startswith("<0x")]
    return FileTokenizer(json.dumps(definition))


def pieces(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=60))
def test_bytes_of_the_oracle(token_ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    assert "".join(pieces(tokenizer.detokenizer(), token_ids)) == tokenizer.decode(token_ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 502), max_size=60))
def test_any_tokens_of_a_byte_level_vocabulary(token_ids: list[int]) -> None:
    tokenizer = byte_level()
    assert "".join(pieces(tokenizer.detokenizer(), token_ids)) == tokenizer.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_text_goes_through_and_no_piece_splits_a_character(text: str) -> None:
    for tokenizer in (byte_level(), ByteTokenizer()):
        parts = pieces(tokenizer.detokenizer(), tokenizer.encode(text))
        assert "".join(parts) == text
        assert "\N{REPLACEMENT CHARACTER}" in text or not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\u2581\N{REPLACEMENT CHARACTER}"), max_size=60), st.data())
def test_spaces_and_characters_of_a_metaspace_vocabulary(text: str, data: st.DataObject) -> None:
    tokenizer = metaspace()
    ids = tokenizer.encode(text)
    special = tokenizer.encode(SPECIAL[1], special_tokens=True)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(ids)))
        ids[at:at] = special[-1:]
    assert isinstance(tokenizer.detokenizer(), WindowDetokenizer)
    clean = [token_id for token_id in ids if token_id != special[-1]]
    assert "".join(pieces(tokenizer.detokenizer(), ids)) == tokenizer.decode(clean) == tokenizer.decode(ids)


def test_a_piece_comes_as_soon_as_its_character_is_complete() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a \U0001f680 b")
    detokenizer = tokenizer.detokenizer()
    shown = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(shown) == "a \U0001f680 b" and detokenizer.flush() == ""
    assert shown[0] == "a"


def test_special_tokens_are_text_in_a_prompt_and_nothing_in_an_answer() -> None:
    tokenizer = byte_level()
    as_text = tokenizer.encode("<|im_end|>")
    as_special = tokenizer.encode("<|im_end|>", special_tokens=True)
    assert len(as_special) == 1 and as_special[0] not in as_text
    assert tokenizer.decode(as_text) == "<|im_end|>" and tokenizer.decode(as_special) == ""


def stop_reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first end of a stop string; of several, the one that starts first."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run_matcher(text: str, cuts: list[int], stops: list[str]) -> tuple[str, str | None]:
    matcher, shown = StopMatcher(stops), ""
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(borders):
        match = matcher.push(text[start:end])
        shown += match.text
        if match.stop is not None:
            return shown, match.stop
        assert not any(shown.endswith(stop) for stop in stops)
    return shown + matcher.flush(), None


_alphabet = st.sampled_from("ab\N{SNOWMAN}")


@settings(max_examples=500, deadline=None)
@given(
    st.text(_alphabet, max_size=30),
    st.lists(st.integers(0, 30), max_size=12),
    st.lists(st.text(_alphabet, min_size=1, max_size=6), max_size=4),
)
def test_stop_strings_do_not_depend_on_the_pieces(text: str, cuts: list[int], stops: list[str]) -> None:
    assert run_matcher(text, cuts, stops) == stop_reference(text, stops)


def test_what_may_be_a_stop_string_is_held_back_and_nothing_else() -> None:
    matcher = StopMatcher(["</end>"])
    assert [matcher.push(piece).text for piece in ("a<", "/e", "x", "</end", "</")] == ["a", "", "</ex", "", "</end"]
    assert matcher.flush() == "</"


@pytest.mark.parametrize("min_tokens", [0, 5, 9])
def test_a_stop_string_counts_behind_min_tokens(min_tokens: int) -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(TextRules(tokenizer.detokenizer, ["ab"], min_tokens))
    shown, stopped_at = "", None
    for index, token_id in enumerate(tokenizer.encode("ab ab ab ab")):
        text, stop = stream.push(token_id)
        shown += text
        if stop:
            stopped_at = index + 1
            break
    assert stopped_at == {0: 2, 5: 8, 9: 11}[min_tokens]
    assert shown == "ab ab ab ab"[: stopped_at - 2]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 502), max_size=40), st.lists(st.text("ehin \u0435", min_size=1, max_size=3), max_size=3))
def test_stops_over_tokens_cut_the_whole_text_at_the_first_stop(token_ids: list[int], stops: list[str]) -> None:
    tokenizer = byte_level()
    stream, shown, stopped = TextStream(TextRules(tokenizer.detokenizer, stops)), "", None
    for token_id in token_ids:
        text, stopped = stream.push(token_id)
        shown += text
        if stopped:
            break
    whole = tokenizer.decode(token_ids)
    if stopped is None:
        assert shown + stream.flush() == whole
    else:
        assert (shown, stopped) == stop_reference(whole, stops)
