from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from tasks.errors import BadData
from tasks.params import Render
from tasks.records import ChatExample, Message, PreferencePair, Record
from tasks.render import render_rows
from tasks.templates import render_prompt
from tests.samples import RENDER


def chat(row_id: str, question: str, reply: str = "yes", group: str = "") -> ChatExample:
    return ChatExample(
        id=row_id, source="s", group=group, messages=(Message("user", question), Message("assistant", reply))
    )


def pair(row_id: str, question: str, chosen: str = "yes", rejected: str = "no") -> PreferencePair:
    return PreferencePair(id=row_id, source="s", prompt=(Message("user", question),), chosen=chosen, rejected=rejected)


def test_equal_prompts_never_cross_the_split(tokenizer: PreTrainedTokenizerBase) -> None:
    """Not even between kinds of rows, nor with other case and space."""
    records: list[Record] = []
    for n in range(60):
        records += [
            chat(f"a{n}", f"question {n}"),
            chat(f"b{n}", f"Question  {n}\n", "no"),
            pair(f"p{n}", f"QUESTION {n}"),
        ]
    rendered, _ = render_rows(records, tokenizer, RENDER)
    side = {row["id"][1:]: split for (split, _), rows in rendered.items() for row in rows}
    assert all(side[row["id"][1:]] == split for (split, _), rows in rendered.items() for row in rows)
    assert set(side.values()) == {"train", "held_out"}
    assert sum(map(len, rendered.values())) == 180


def test_a_named_group_stays_together(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [chat(str(n), f"question {n}", group="one fact") for n in range(20)]
    rendered, _ = render_rows(records, tokenizer, Render(held_out=0.5, max_tokens=64, too_long="refuse"))
    assert sorted(len(rows) for (_, kind), rows in rendered.items() if kind == "chat") == [0, 20]


def test_pairs_share_their_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered, _ = render_rows([pair("1", "which?", "left", "right")], tokenizer, RENDER)
    (row,) = (row for (_, kind), rows in rendered.items() if kind == "preference" for row in rows)
    assert row["prompt_ids"] == render_prompt(tokenizer, [Message("user", "which?")])
    for reply in ("chosen_ids", "rejected_ids"):
        assert row[reply][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["chosen_ids"]) == "left<|im_end|>"


LONG = "word " * 60


@pytest.mark.parametrize(("policy", "kept", "truncated", "dropped"), [("truncate", 2, 1, 0), ("drop", 1, 0, 1)])
def test_what_is_too_long_is_counted(
    tokenizer: PreTrainedTokenizerBase, policy: str, kept: int, truncated: int, dropped: int
) -> None:
    params = Render.model_validate({"held_out": 0.0, "max_tokens": 40, "too_long": policy})
    rendered, counts = render_rows([chat("short", "hi"), chat("long", "hi", LONG)], tokenizer, params)
    rows = rendered["train", "chat"]
    assert len(rows) == kept
    assert counts == {"truncated": truncated, "dropped": dropped}
    assert all(len(row["ids"]) == len(row["mask"]) <= 40 and any(row["mask"]) for row in rows)


@pytest.mark.parametrize(
    ("policy", "record", "said"),
    [
        ("refuse", chat("bad", "hi", LONG), "longer than render.max_tokens"),
        ("truncate", chat("bad", LONG), "nothing is left to learn"),
        ("truncate", pair("bad", LONG), "the same"),
        ("truncate", pair("bad", "hi", LONG + "a", LONG + "b"), "the same"),
    ],
)
def test_a_row_with_nothing_to_learn_is_refused(
    tokenizer: PreTrainedTokenizerBase, policy: str, record: Record, said: str
) -> None:
    params = Render.model_validate({"held_out": 0.0, "max_tokens": 40, "too_long": policy})
    with pytest.raises(BadData) as caught:
        render_rows([chat("good", "hi"), record], tokenizer, params)
    assert caught.value.what == "1 rows cannot be rendered"
    assert caught.value.examples[0].startswith("bad: ")
    assert said in caught.value.examples[0]
