"""The families of questions: each draws a fact, puts it into words, and knows the answer and a typical slip.

The shipped base model was pretrained on what they say, and a tenth of their facts was withheld from it: a change here
means making it anew (`make base`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


class Word(NamedTuple):
    """One meaning in both languages."""

    en: str
    zh: str


@dataclass(frozen=True)
class Lexicon:
    """The words that questions are made of; `data/lexicon.yaml` as read."""

    animals: tuple[Word, ...]
    things: tuple[Word, ...]
    colours: tuple[Word, ...]
    names: tuple[Word, ...]
    places: tuple[Word, ...]
    days: tuple[Word, ...]
    months: tuple[Word, ...]


class Voice(NamedTuple):
    """Says things in one language (`en` or `zh`), choosing among that language's phrases."""

    language: str
    random: Random

    def of(self, value: object) -> str:
        """Format a word, a list of words or anything else as this language writes it."""
        if isinstance(value, Word):
            return value.en if self.language == "en" else value.zh
        if isinstance(value, Sequence) and not isinstance(value, str):
            return (", " if self.language == "en" else "、").join(self.of(item) for item in value)
        return str(value)

    def say(self, en: Sequence[str], zh: Sequence[str], **values: object) -> str:
        """Build one of this language's phrases with its `{names}` filled in."""
        phrase = self.random.choice(en if self.language == "en" else zh)
        return phrase.format(**{name: self.of(value) for name, value in values.items()})


class SyntheticQuestion(NamedTuple):
    """One checkable question. `mistake` is what someone who slips would answer; it is never the answer."""

    family: str
    fact: str
    text: str
    answer: str
    mistake: str

    @property
    def group(self) -> str:
        """Return the fact's name among all families."""
        return f"{self.family}/{self.fact}"


# --- the families: each draws a fact, puts it into words, and knows the answer and a typical slip ---------------------


def arithmetic(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Addition and subtraction of numbers below 100; the slip loses a carry or miscounts by one."""
    low, high = sorted((random.randrange(100), random.randrange(100)))
    slip = random.choice((1, 10))
    if random.random() < 0.5:
        a, b = random.sample((low, high), 2)
        text = voice.say(
            ("What is {a} plus {b}?", "Add {a} and {b}."), ("{a}加{b}等于多少？", "求{a}与{b}的和。"), a=a, b=b
        )
        return SyntheticQuestion("arithmetic", f"{low}+{high}", text, str(a + b), str(a + b + slip))
    text = voice.say(
        ("What is {a} minus {b}?", "Take {b} away from {a}."),
        ("{a}减{b}等于多少？", "从{a}里去掉{b}还剩多少？"),
        a=high,
        b=low,
    )
    return SyntheticQuestion("arithmetic", f"{high}-{low}", text, str(high - low), str(high - low + slip))


UNITS = (  # from, to, how many of the second make one of the first
    (Word("metres", "米"), Word("centimetres", "厘米"), 100),
    (Word("kilometres", "公里"), Word("metres", "米"), 1000),
    (Word("kilograms", "公斤"), Word("grams", "克"), 1000),
    (Word("centimetres", "厘米"), Word("millimetres", "毫米"), 10),
    (Word("litres", "升"), Word("millilitres", "毫升"), 1000),
)


def units(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Conversion to the smaller unit; the slip is ten times too large."""
    large, small, factor = random.choice(UNITS)
    n = random.randint(2, 999)
    text = voice.say(
        ("How many {small} are there in {n} {large}?", "Write {n} {large} in {small}."),
        ("{n}{large}等于多少{small}？", "把{n}{large}换算成{small}。"),
        n=n,
        large=large,
        small=small,
    )
    return SyntheticQuestion("units", f"{n} {large.en} in {small.en}", text, str(n * factor), str(n * factor * 10))


def ordering(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Sorting three or four numbers; the slip sorts the wrong way round."""
    numbers = random.sample(range(100), random.randint(3, 4))
    ways = (Word("small to large", "小到大"), Word("large to small", "大到小"))
    falling = random.randrange(2)
    text = voice.say(
        ("Sort from {way}: {items}", "Put these in order from {way}: {items}"),
        ("从{way}排列：{items}", "把这些数从{way}排好：{items}"),
        way=ways[falling],
        items=numbers,
    )
    right, wrong = sorted(numbers, reverse=bool(falling)), sorted(numbers, reverse=not falling)
    return SyntheticQuestion("ordering", f"{ways[falling].en} {numbers}", text, voice.of(right), voice.of(wrong))


def extremes(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Ask for the largest or smallest of some numbers; the slip takes the opposite end."""
    numbers = random.sample(range(100), random.randint(3, 5))
    which, right, wrong = random.choice(
        ((Word("largest", "最大"), max, min), (Word("smallest", "最小"), min, max)),
    )
    text = voice.say(
        ("Which number is the {which}: {items}?", "Name the {which} number: {items}"),
        ("哪个数{which}：{items}？", "找出{which}的数：{items}"),
        which=which,
        items=numbers,
    )
    return SyntheticQuestion("extremes", f"{which.en} {numbers}", text, str(right(numbers)), str(wrong(numbers)))


def dates(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Ask for days or months by place in the week or year: first, last, all in order; the slip takes the wrong end."""
    calendar, span = random.choice(((lexicon.days, Word("week", "一周")), (lexicon.months, Word("year", "一年"))))
    items = random.sample(calendar, random.randint(2, 4))
    in_order = sorted(items, key=calendar.index)
    if random.random() < 0.5:
        text = voice.say(
            ("Put these in the order of the {span}: {items}", "Sort by the {span}: {items}"),
            ("按{span}的顺序排列：{items}", "按{span}里的先后排好：{items}"),
            span=span,
            items=items,
        )
        return SyntheticQuestion("dates", f"order {_fact(items)}", text, voice.of(in_order), voice.of(in_order[::-1]))
    which, right, wrong = random.choice(((Word("first", "最早"), 0, -1), (Word("last", "最晚"), -1, 0)))
    text = voice.say(
        ("Which comes {which} in the {span}: {items}?", "Of these, which is {which} in the {span}: {items}?"),
        ("{span}里哪个{which}：{items}？", "这些里面，{span}中{which}的是哪个：{items}？"),
        which=which,
        span=span,
        items=items,
    )
    return SyntheticQuestion(
        "dates", f"{which.en} {_fact(items)}", text, voice.of(in_order[right]), voice.of(in_order[wrong])
    )


def counting(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Ask how many animals stand in a list; the slip is one too many."""
    animals = random.sample(lexicon.animals, random.randint(1, 4))
    items = animals + random.sample(lexicon.things, random.randint(1, 3))
    random.shuffle(items)
    text = voice.say(
        ("How many animals are in this list: {items}?", "Count the animals: {items}"),
        ("这里有几种动物：{items}？", "数一数动物：{items}"),
        items=items,
    )
    return SyntheticQuestion("counting", _fact(items), text, str(len(animals)), str(len(animals) + 1))


def odd_one(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Ask for the only word of a list that is of another kind; the slip names one of the others."""
    many, few, kind = random.choice(
        (
            (lexicon.animals, lexicon.things, Word("an animal", "动物")),
            (lexicon.things, lexicon.animals, Word("a thing", "东西")),
        )
    )
    rest, odd = random.sample(many, random.randint(2, 4)), random.choice(few)
    items = [*rest, odd]
    random.shuffle(items)
    text = voice.say(
        ("Which one is not {kind}: {items}?", "Find the word that is not {kind}: {items}"),
        ("哪一个不是{kind}：{items}？", "找出不是{kind}的词：{items}"),
        kind=kind,
        items=items,
    )
    return SyntheticQuestion("odd_one", _fact(items), text, voice.of(odd), voice.of(rest[0]))


def words(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Ask for a word by its place, or the list reversed; the slip takes the wrong place or leaves the order."""
    items = random.sample(lexicon.animals + lexicon.things + lexicon.colours, random.randint(3, 5))
    if random.random() < 0.3:
        text = voice.say(
            ("Write this list backwards: {items}", "Reverse the order: {items}"),
            ("倒着写这个列表：{items}", "把顺序反过来：{items}"),
            items=items,
        )
        return SyntheticQuestion("words", f"backwards {_fact(items)}", text, voice.of(items[::-1]), voice.of(items))
    index, which = random.choice(
        (
            (0, Word("first", "第一")),
            (1, Word("second", "第二")),
            (2, Word("third", "第三")),
            (-1, Word("last", "最后一")),
        )
    )
    text = voice.say(
        ("What is the {which} word: {items}?", "Give the {which} word of this list: {items}"),
        ("{which}个词是什么：{items}？", "写出{which}个词：{items}"),
        which=which,
        items=items,
    )
    slip = items[1 if index in (0, -1) else 0]
    return SyntheticQuestion("words", f"{which.en} {_fact(items)}", text, voice.of(items[index]), voice.of(slip))


def sequences(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Ask for the next number of an arithmetic progression; the slip is one off."""
    start, step = random.randint(1, 40), random.randint(1, 10)
    terms = [start + step * i for i in range(5)]
    if random.random() < 0.3:
        terms.reverse()
    text = voice.say(
        ("Which number comes next: {items}?", "Continue the sequence: {items}"),
        ("下一个数是什么：{items}？", "继续这个数列：{items}"),
        items=terms[:4],
    )
    return SyntheticQuestion("sequences", f"{terms[0]} {terms[1]}", text, str(terms[4]), str(terms[4] + 1))


def reading(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Ask who has what and in which colour, out of two or three sentences; the slip mixes up two people."""
    n = random.randint(2, 3)
    people, things, colours = (random.sample(pool, n) for pool in (lexicon.names, lexicon.things, lexicon.colours))
    rows = list(zip(people, colours, things, strict=True))
    told = "".join(voice.say(("{p} has the {c} {t}. ",), ("{p}有{c}的{t}。",), p=p, c=c, t=t) for p, c, t in rows)
    (person, colour, thing), (other_person, other_colour, _) = random.sample(rows, 2)
    fact = _fact([word for row in rows for word in row])
    if random.random() < 0.5:
        text = told + voice.say(("Who has the {t}?",), ("谁有{t}？",), t=thing)
        return SyntheticQuestion("reading", f"who {thing.en} {fact}", text, voice.of(person), voice.of(other_person))
    text = told + voice.say(("Which colour is the {t}?",), ("{t}是什么颜色的？",), t=thing)
    return SyntheticQuestion("reading", f"colour {thing.en} {fact}", text, voice.of(colour), voice.of(other_colour))


def translation(random: Random, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Ask for a colour and a noun in the other language; the slip leaves out the colour."""
    colour, noun = random.choice(lexicon.colours), random.choice(lexicon.animals + lexicon.things)
    text = voice.say(
        ("Write in Chinese: {c} {n}", "Translate into Chinese: {c} {n}"),
        ("用英语写：{c}的{n}", "翻译成英语：{c}的{n}"),
        c=colour,
        n=noun,
    )
    answer, slip = (
        (f"{colour.zh}的{noun.zh}", noun.zh) if voice.language == "en" else (f"{colour.en} {noun.en}", noun.en)
    )
    return SyntheticQuestion("translation", f"{colour.en} {noun.en}", text, answer, slip)


def _fact(items: Sequence[Word]) -> str:
    return " ".join(word.en for word in items)


FAMILIES: Mapping[str, Callable[[Random, Lexicon, Voice], SyntheticQuestion]] = {
    family.__name__: family
    for family in (
        arithmetic,
        units,
        ordering,
        extremes,
        dates,
        counting,
        odd_one,
        words,
        sequences,
        reading,
        translation,
    )
}
