from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from transformers import PreTrainedTokenizerBase

from flows.serve.text_stream import AnswerText, Detokenizer, StopCutter, Strip
from tasks.tokenization.chat_template import load_tokenizer
from tests.conftest import ROOT


@pytest.fixture(scope="module", params=["pico", "tiny"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return tokenizer if request.param == "pico" else load_tokenizer(ROOT / "models" / "tiny")


def test_pieces_together_are_what_all_tokens_decode_to(any_tokenizer: PreTrainedTokenizerBase, random: Random) -> None:
    for _ in range(50):
        ids = [random.randrange(len(any_tokenizer)) for _ in range(40)]
        stream = Detokenizer(any_tokenizer)
        pieces = [stream.add(token) for token in ids]
        assert "".join(pieces) + stream.rest() == any_tokenizer.decode(ids, skip_special_tokens=True)


def test_no_piece_has_half_a_character(any_tokenizer: PreTrainedTokenizerBase) -> None:
    """Each of these characters is several tokens in vocabularies that have no such character."""
    text = "naïve 你好 🙂🇩🇪 Ω"
    ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = Detokenizer(any_tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "" in pieces  # something was held back
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_what_never_becomes_a_character_is_given_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    stream = Detokenizer(tokenizer)
    assert [stream.add(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.rest() == tokenizer.decode(ids[:-1])


def test_control_tokens_that_are_shown_are_written(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token_id
    stream = Detokenizer(tokenizer, {end: "[CALLS]"})
    ids = [*tokenizer("ab", add_special_tokens=False)["input_ids"], end]
    assert "".join(map(stream.add, ids)) + stream.rest() == "ab[CALLS]"


def cut(text: str, stops: list[str]) -> str:
    """The text up to the stop text that is complete first, of several there the longest: said another way."""
    for end in range(len(text) + 1):
        for start in range(end + 1):
            if text[start:end] in stops:
                return text[:start]
    return text


def test_a_stop_text_cuts_the_same_whatever_the_pieces_are(random: Random) -> None:
    for _ in range(2000):
        text = "".join(random.choice("ab") for _ in range(random.randrange(12)))
        stops = [
            "".join(random.choice("ab") for _ in range(random.randrange(1, 5))) for _ in range(random.randrange(4))
        ]
        cutter, given = StopCutter(stops), ""
        rest = text
        while rest:
            size = random.randrange(1, 4)
            given += cutter.add(rest[:size])
            assert cut(text, stops).startswith(given)
            rest = rest[size:]
        assert given + cutter.rest() == cut(text, stops)
        assert cutter.stopped == (cut(text, stops) != text or any(stop in text for stop in stops))


def test_only_what_may_be_a_beginning_is_held_back() -> None:
    cutter = StopCutter(["\n\nUser:"])
    assert [cutter.add(piece) for piece in ("Hello", "\n", "\nUs", "a", " b")] == ["Hello", "", "", "\n\nUsa", " b"]


def test_white_space_is_taken_off_both_ends(random: Random) -> None:
    for _ in range(500):
        text = "".join(random.choice("a \n\u3000") for _ in range(random.randrange(10)))
        strip = Strip()
        assert "".join(map(strip.add, text)) == text.strip()


def test_a_chat_answer_is_stripped_and_a_completion_is_not(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("\n a b \n", add_special_tokens=False)["input_ids"]
    for strip, expected in ((True, "a b"), (False, "\n a b \n")):
        text = AnswerText(tokenizer, strip=strip, end_ids=[tokenizer.eos_token_id])
        pieces = [text.add(token) for token in [*ids, tokenizer.eos_token_id]]
        assert "".join(pieces) + text.rest() == expected


def test_a_stop_text_may_span_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abcdef"]
    text = AnswerText(tokenizer, strip=True, stop=["cde"])
    pieces = [text.add(token) for token in ids]
    assert pieces == ["a", "b", "", "", "", ""]
    assert text.stopped
    assert text.rest() == ""
