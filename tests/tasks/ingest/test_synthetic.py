"""The generator's answers are checked by working them out again from the words of the question alone."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tasks.core.errors import BadData
from tasks.core.records import ChatExample, PreferencePair, TextExample, held_out
from tasks.ingest.synthetic import Recipe, generate_rows, read_lexicon
from tasks.ingest.synthetic_questions import FAMILIES, Lexicon
from tests.conftest import ROOT

WORDS = ROOT / "data" / "lexicon.yaml"


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return read_lexicon(WORDS)


def pairs(lexicon: Lexicon, count: int = 3000, seed: int = 5) -> list[PreferencePair]:
    return [r for r in generate_rows(Recipe("s", "preference", count, seed), lexicon) if isinstance(r, PreferencePair)]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def listed(text: str) -> list[str]:
    """The items of a list that stands after a colon, in either language."""
    tail = re.split(r"[:：]", text)[-1].rstrip("?？")
    return [item.strip() for item in re.split(r"[,、]", tail)]


def solve(family: str, question: str, lexicon: Lexicon) -> str:
    """A second, independent way to the answer."""
    english = not re.search(r"[\u4e00-\u9fff]", re.split(r"[:：]", question)[0])
    join = ", ".join if english else "、".join
    if family == "arithmetic":
        a, b = numbers(question)
        if re.search(r"plus|Add|加|和", question):
            return str(a + b)
        return str(b - a) if question.startswith("Take") else str(a - b)
    if family == "units":
        sizes = {"metres": 1000, "米": 1000, "kilometres": 10**6, "公里": 10**6, "kilograms": 1000, "公斤": 1000}
        sizes |= {"centimetres": 10, "厘米": 10, "millimetres": 1, "毫米": 1, "litres": 1000, "升": 1000}
        sizes |= {"millilitres": 1, "毫升": 1, "grams": 1, "克": 1}
        (n,) = numbers(question)
        if english:
            found = re.findall(
                r"kilometres|centimetres|millimetres|metres|kilograms|grams|millilitres|litres", question
            )
            small, large = (found[0], found[1]) if question.startswith("How") else (found[1], found[0])
        else:
            found = re.findall(r"公里|厘米|毫米|公斤|毫升|米|克|升", question)
            large, small = found[0], found[1]
        return str(n * sizes[large] // sizes[small])
    if family == "ordering":
        falling = bool(re.search(r"large to small|大到小", question))
        return join(map(str, sorted(numbers(question), reverse=falling)))
    if family == "extremes":
        return str((max if re.search(r"largest|最大", question) else min)(numbers(question)))
    if family == "sequences":
        terms = numbers(question)
        return str(2 * terms[-1] - terms[-2])
    if family == "counting":
        animals = {form for word in lexicon.animals for form in word}
        return str(sum(item in animals for item in listed(question)))
    if family == "odd_one":
        animals = {form for word in lexicon.animals for form in word}
        kinds = [item in animals for item in listed(question)]
        return listed(question)[kinds.index(kinds.count(True) == 1)]
    if family == "words":
        items = listed(question)
        if re.search(r"backwards|Reverse|倒|反", question):
            return join(reversed(items))
        places = {"first": 0, "第一": 0, "second": 1, "第二": 1, "third": 2, "第三": 2, "last": -1, "最后": -1}
        return items[next(place for name, place in places.items() if name in question)]
    if family == "dates":
        items = listed(question)
        calendar = [form for words in (lexicon.days, lexicon.months) for word in words for form in (word.en, word.zh)]
        items.sort(key=calendar.index)
        if re.search(r"order|Sort|排", question):
            return join(items)
        return items[-1] if re.search(r"last|最晚", question) else items[0]
    if family == "translation":
        other = {w.en: w.zh for w in (*lexicon.colours, *lexicon.animals, *lexicon.things)}
        if english:
            colour, noun = question.split(": ")[1].split()
            return f"{other[colour]}的{other[noun]}"
        back = {zh: en for en, zh in other.items()}
        colour, noun = question.split("：")[1].split("的")
        return f"{back[colour]} {back[noun]}"
    if family == "reading":
        told = re.findall(r"(\w+) has the (\w+) (\w+)\.", question) or re.findall(
            r"(?:^|。)(.+?)有(.+?)的(.+?)(?=。)", question
        )
        asked = (
            re.search(r"(?:has|is) the (\w+)\?", question)
            or re.search(r"谁有(.+)？", question)
            or re.search(r"。([^。]+)是什么颜色", question)
        )[1]  # type: ignore[index]
        who, colour = next((str(p), str(c)) for p, c, thing in told if thing == asked)
        return who if re.search(r"Who|谁", question) else colour
    raise AssertionError(family)


def test_every_answer_is_right_and_every_mistake_is_wrong(lexicon: Lexicon) -> None:
    for pair in pairs(lexicon):
        question = pair.prompt[0].content
        assert solve(pair.family, question, lexicon) == pair.chosen, question
        assert pair.rejected != pair.chosen, question


def test_there_are_eight_families_or_more_and_both_languages(lexicon: Lexicon) -> None:
    made = pairs(lexicon)
    families = Counter(pair.family for pair in made)
    assert set(families) == set(FAMILIES)
    assert len(families) >= 8
    assert min(families.values()) > 3000 / len(families) / 2
    chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", pair.prompt[0].content)) for pair in made)
    assert 1300 < chinese < 2000  # half, and the few English questions whose answer is Chinese


def test_the_same_seed_gives_the_same_rows_and_more_rows_change_none(lexicon: Lexicon) -> None:
    few = list(generate_rows(Recipe("s", "chat", 50, 3), lexicon))
    many = list(islice(generate_rows(Recipe("s", "chat", 10**9, 3), lexicon), 200))
    assert few == many[:50]
    assert few != list(generate_rows(Recipe("s", "chat", 50, 4), lexicon))


def test_a_fact_has_one_name_in_every_form(lexicon: Lexicon) -> None:
    """17 + 25 and 25 + 17, in English or Chinese, are one fact: they are held out together or not at all."""
    sums: dict[frozenset[int] | int, set[str]] = {}
    for pair in pairs(lexicon, 20_000):
        if pair.family == "arithmetic" and "+" in pair.group:
            sums.setdefault(frozenset(numbers(pair.prompt[0].content)), set()).add(pair.group)
    assert all(len(names) == 1 for names in sums.values())
    assert len(sums) > 500


def test_withheld_facts_are_never_drawn(lexicon: Lexicon) -> None:
    drawn = list(generate_rows(Recipe("s", "chat", 2000, 1, withheld=0.3), lexicon))
    assert not any(held_out(row.group, 0.3) for row in drawn)
    everything = list(generate_rows(Recipe("s", "chat", 2000, 1), lexicon))
    assert 0.2 < sum(held_out(row.group, 0.3) for row in everything) / 2000 < 0.4


def test_documents_and_talk(lexicon: Lexicon) -> None:
    texts = list(generate_rows(Recipe("s", "text", 50, 1), lexicon))
    assert all(
        isinstance(r, TextExample) and re.match(r"Question:\n.+\nAnswer:\n|问题：\n.+\n答案：\n", r.text) for r in texts
    )
    chats = list(generate_rows(Recipe("s", "talk", 50, 1), lexicon))
    for chat in chats:
        assert isinstance(chat, ChatExample)
        assert [m.role for m in chat.messages] == ["user", "assistant"] * (len(chat.messages) // 2)


def test_a_broken_lexicon_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("animals:\n  - cat\n")
    with pytest.raises(BadData, match="lexicon"):
        read_lexicon(tmp_path / "bad.yaml")
    with pytest.raises(BadData, match="lexicon"):
        read_lexicon(tmp_path / "missing.yaml")
