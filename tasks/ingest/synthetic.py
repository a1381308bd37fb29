"""Rows with checkable answers, made from a seed: the data that a fresh clone works on.

A question states a *fact*, such as ``17+25``. The fact is the row's ``group``: it is the same in English and in
Chinese, in every phrasing, and as document, chat or preference pair, so a fact that is held out is held out in every
form. Row ``i`` depends on the seed and on ``i`` alone: asking for more rows never changes the ones there were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tasks.core.errors import BadData
from tasks.core.records import ChatExample, Message, PreferencePair, Record, TextExample, held_out
from tasks.ingest.synthetic_questions import FAMILIES, Lexicon, SyntheticQuestion, Voice, Word

# --- small talk: chats about other things, so that a base model knows the form of a chat and not the tasks in it ------


def _greeting(random: Random, lexicon: Lexicon, voice: Voice) -> tuple[str, str]:
    name = random.choice(lexicon.names)
    return (
        voice.say(
            ("Hello, I am {n}.", "Good morning, my name is {n}."), ("你好，我是{n}。", "早上好，我叫{n}。"), n=name
        ),
        voice.say(
            ("Hello {n}, nice to meet you.", "Welcome, {n}."), ("你好{n}，很高兴认识你。", "欢迎你，{n}。"), n=name
        ),
    )


def _liking(random: Random, lexicon: Lexicon, voice: Voice) -> tuple[str, str]:
    colour, other, noun = random.choice(lexicon.colours), random.choice(lexicon.colours), random.choice(lexicon.things)
    return (
        voice.say(
            ("What do you think of the {c} {t}?", "Which {t} do you like?", "Do you like my {c} {t}?"),
            ("你觉得{c}的{t}怎么样？", "你喜欢哪个{t}？", "你喜欢我的{c}的{t}吗？"),
            c=colour,
            t=noun,
        ),
        voice.say(
            ("I like the {o} {t} more.", "To me the {t} looks nice, and {o} is a nice colour."),
            ("我更喜欢{o}的{t}。", "我觉得{t}很好看，{o}也很好看。"),
            o=other,
            t=noun,
        ),
    )


def _whereabouts(random: Random, lexicon: Lexicon, voice: Voice) -> tuple[str, str]:
    animal, place, day = random.choice(lexicon.animals), random.choice(lexicon.places), random.choice(lexicon.days)
    return (
        voice.say(
            ("Where did you see the {a}?", "Tell me about the {a}.", "How many times did you see a {a}?"),
            ("你在哪里看到{a}了？", "跟我说说{a}吧。", "你见过几次{a}？"),
            a=animal,
        ),
        voice.say(
            ("I saw the {a} in the {p} on {d}.", "On {d} there was a {a} in the {p}."),
            ("{d}我在{p}看到了{a}。", "{d}在{p}有{a}。"),
            a=animal,
            p=place,
            d=day,
        ),
    )


def _plan(random: Random, lexicon: Lexicon, voice: Voice) -> tuple[str, str]:
    month, place, name = random.choice(lexicon.months), random.choice(lexicon.places), random.choice(lexicon.names)
    n = random.randint(2, 99)
    return (
        voice.say(
            ("What will you do in {m}?", "Write me a plan for {m}.", "Give me {n} reasons to come in {m}."),
            ("{m}你要做什么？", "给我写一个{m}的计划。", "给我{n}个{m}来的理由。"),
            m=month,
            n=n,
        ),
        voice.say(
            ("In {m} I want to go to the {p} with {w}.", "{w} and I will be in the {p} for {n} days."),
            ("{m}我想和{w}一起去{p}。", "我和{w}会在{p}待{n}天。"),
            m=month,
            p=place,
            w=name,
            n=n,
        ),
    )


def _choice(random: Random, lexicon: Lexicon, voice: Voice) -> tuple[str, str]:
    items: list[object] = list(random.sample(lexicon.animals + lexicon.things + lexicon.colours, random.randint(2, 5)))
    if random.random() < 0.5:
        items = list(random.sample(range(100), random.randint(2, 5)))
    return (
        voice.say(
            (
                "Which one do you like: {i}?",
                "Choose one of these: {i}",
                "Which word or number is nice: {i}?",
                "What about {i}?",
            ),
            ("你喜欢哪一个：{i}？", "选一个吧：{i}", "哪个词或数好看：{i}？", "{i}怎么样？"),
            i=items,
        ),
        voice.say(
            (
                "I would choose {o}, but {p} is nice too.",
                "Let me think. {o} is a good choice.",
                "It is hard to choose, maybe {o}.",
            ),
            ("我会选{o}，不过{p}也不错。", "让我想想，{o}是个好选择。", "很难选，也许{o}吧。"),
            o=random.choice(items),
            p=random.choice(items),
        ),
    )


def _note(random: Random, lexicon: Lexicon, voice: Voice) -> tuple[str, str]:
    a, b = random.randrange(100), random.randrange(100)
    thing, person = random.choice(lexicon.things), random.choice(lexicon.names)
    return (
        voice.say(
            (
                "I have {a} {t} and {b} more at home.",
                "Write down {a} and {b} for {n}.",
                "{n} has the {t}. Is that good?",
            ),
            ("我有{a}个{t}，家里还有{b}个。", "帮{n}写下{a}和{b}。", "{n}有{t}。好不好？"),
            a=a,
            b=b,
            t=thing,
            n=person,
        ),
        voice.say(
            ("Good, I will tell {n} about it.", "I wrote it down, thank you.", "That is a lot, {n} will like it."),
            ("好的，我会告诉{n}。", "我写下来了，谢谢。", "真不少，{n}会喜欢的。"),
            n=person,
        ),
    )


def _thanks(random: Random, lexicon: Lexicon, voice: Voice) -> tuple[str, str]:
    return (
        voice.say(("Thank you.", "That helps, thanks."), ("谢谢。", "这很有用，谢谢你。")),
        voice.say(("You are welcome.", "I am glad to hear it."), ("不客气。", "很高兴听到你这么说。")),
    )


SMALL_TALK = (_greeting, _liking, _whereabouts, _plan, _choice, _note, _thanks)


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Recipe of generated rows: `rows` is one of ROWS; the share `withheld` of all facts (0 to 1) is left out."""

    source: str
    rows: str
    count: int
    seed: int
    withheld: float = 0.0


def generate_rows(recipe: Recipe, lexicon: Lexicon) -> Iterator[Record]:
    """Yield the recipe's rows, in order."""
    make = ROWS[recipe.rows]
    for index in range(recipe.count):
        random = Random(f"{recipe.seed}/{recipe.rows}/{index}")
        voice = Voice(random.choice(("en", "zh")), random)
        yield make(f"{recipe.source}-{index}", recipe, lexicon, voice)


def _ask(recipe: Recipe, lexicon: Lexicon, voice: Voice) -> SyntheticQuestion:
    """Draw a question whose fact is not withheld."""
    while True:
        question = voice.random.choice(list(FAMILIES.values()))(voice.random, lexicon, voice)
        if not held_out(question.group, recipe.withheld):
            return question


def _chat(row_id: str, recipe: Recipe, lexicon: Lexicon, voice: Voice) -> ChatExample:
    """Build a question and its answer as a chat."""
    question = _ask(recipe, lexicon, voice)
    return ChatExample(
        id=row_id,
        source=recipe.source,
        family=question.family,
        group=question.group,
        messages=(Message("user", question.text), Message("assistant", question.answer)),
    )


def _preference(row_id: str, recipe: Recipe, lexicon: Lexicon, voice: Voice) -> PreferencePair:
    """Build a pair of the right answer and a typical mistake."""
    question = _ask(recipe, lexicon, voice)
    return PreferencePair(
        id=row_id,
        source=recipe.source,
        family=question.family,
        group=question.group,
        prompt=(Message("user", question.text),),
        chosen=question.answer,
        rejected=question.mistake,
    )


def _text(row_id: str, recipe: Recipe, lexicon: Lexicon, voice: Voice) -> TextExample:
    """Build a document of one to four questions with their answers."""
    form = voice.random.choice(DOCUMENT_FORMS[voice.language])
    asked = [_ask(recipe, lexicon, voice) for _ in range(voice.random.randint(1, 4))]
    return TextExample(
        id=row_id, source=recipe.source, text="\n".join(form.format(q=each.text, a=each.answer) for each in asked)
    )


def _talk(row_id: str, recipe: Recipe, lexicon: Lexicon, voice: Voice) -> ChatExample:
    """Build a chat of one to three exchanges of small talk."""
    messages: list[Message] = []
    for exchange in voice.random.choices(SMALL_TALK, k=voice.random.randint(1, 3)):
        user, assistant = exchange(voice.random, lexicon, voice)
        messages += [Message("user", user), Message("assistant", assistant)]
    return ChatExample(id=row_id, source=recipe.source, family="talk", messages=tuple(messages))


DOCUMENT_FORMS = {
    "en": ("Question:\n{q}\nAnswer:\n{a}\n",),
    "zh": ("问题：\n{q}\n答案：\n{a}\n",),
}

ROWS: Mapping[str, Callable[[str, Recipe, Lexicon, Voice], Record]] = {
    "chat": _chat,
    "preference": _preference,
    "text": _text,
    "talk": _talk,
}


def read_lexicon(path: Path) -> Lexicon:
    """Read the word lists.

    Raises:
        BadData: the file is not a mapping of the lists that `Lexicon` names to `english: chinese` pairs.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(path)
        return Lexicon(**{name: tuple(Word(en, zh) for en, zh in pairs.items()) for name, pairs in content.items()})
    except (OSError, YAMLError, AttributeError, TypeError) as error:
        raise BadData(
            "cannot be read as a lexicon",
            where=str(path),
            got=str(error),
            expected="a mapping of word lists, each `english: chinese`",
            fix="start from the data/lexicon.yaml that temper ships",
        ) from error
