from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase, T5Tokenizer

from tasks.core.errors import BadData
from tasks.core.records import ChatExample, LabelledReply, Message, PreferencePair, Record, SeqPair
from tasks.render.params import Render
from tasks.render.stage import ROWS_AT_ONCE, length_report, render_rows
from tasks.tokenization.chat_template import render_prompt
from tests.helpers.samples import RENDER


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
    rendered, _ = render_rows(records, tokenizer, RENDER.model_copy(update={"held_out": 0.5, "max_tokens": 64}))
    assert sorted(len(rows) for (_, kind), rows in rendered.items() if kind == "chat") == [0, 20]


def test_pairs_share_their_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered, _ = render_rows([pair("1", "which?", "left", "right")], tokenizer, RENDER)
    (row,) = (row for (_, kind), rows in rendered.items() if kind == "preference" for row in rows)
    assert row["prompt_ids"] == render_prompt(tokenizer, [Message("user", "which?")])
    for reply in ("chosen_ids", "rejected_ids"):
        assert row[reply][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["chosen_ids"]) == "left<|im_end|>"


def test_every_kind_of_row_is_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    records: list[Record] = [
        LabelledReply(id="l", source="s", prompt=(Message("user", "which?"),), reply="left", label=False),
        SeqPair(id="p", source="s", input="one two", target="zwei"),
    ]
    rendered, _ = render_rows(records, tokenizer, RENDER)
    rows = {kind: row for (_, kind), found in rendered.items() for row in found}
    assert rows["labelled"]["prompt_ids"] == render_prompt(tokenizer, [Message("user", "which?")])
    assert tokenizer.decode(rows["labelled"]["reply_ids"]) == "left<|im_end|>"
    assert rows["labelled"]["label"] is False
    assert rows["pair"]["target_ids"] == tokenizer("zwei")["input_ids"]


def test_pairs_end_as_t5_ends_them() -> None:
    """mT5's tokenizer is of the same class, with other pieces."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁is", -4.0), ("▁complaint", -4.0)]
    t5 = T5Tokenizer(vocab=pieces + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz:"])
    record = SeqPair(id="p", source="s", input="is it", target="complaint")
    rendered, _ = render_rows([record], t5, RENDER)
    (row,) = (row for (_, kind), rows in rendered.items() if kind == "pair" for row in rows)
    assert t5.convert_ids_to_tokens(row["target_ids"]) == ["▁complaint", "</s>"]
    assert t5.convert_ids_to_tokens(row["input_ids"]) == ["▁is", "▁", "i", "t", "</s>"]


def test_many_rows_at_once_are_the_rows_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    records: list[Record] = [chat(str(n), "what? " * (n % 7), "yes " * (n % 5 + 1)) for n in range(ROWS_AT_ONCE + 5)]
    params = RENDER.model_copy(update={"held_out": 0.0})
    together, _ = render_rows(records, tokenizer, params)
    some = [0, 1, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 4]
    assert [together["train", "chat"][n] for n in some] == [
        render_rows([records[n]], tokenizer, params)[0]["train", "chat"][0] for n in some
    ]


def test_the_report_counts_tokens() -> None:
    rows = [{"ids": [1] * n, "mask": [False] * (n - 1) + [True], "prompt_tokens": n - 1} for n in (3, 7, 1, 4, 5)]
    assert length_report(rows, "chat") == {
        "rows": 5,
        "tokens": 20,
        "p50": 4,
        "p90": 7,
        "p99": 7,
        "longest": 7,
        "target_tokens": 5,
    }


LONG = "word " * 60


@pytest.mark.parametrize(("policy", "kept", "truncated", "dropped"), [("truncate", 2, 1, 0), ("drop", 1, 0, 1)])
def test_what_is_too_long_is_counted(
    tokenizer: PreTrainedTokenizerBase, policy: str, kept: int, truncated: int, dropped: int
) -> None:
    params = Render.model_validate({"held_out": 0.0, "max_tokens": 40, "too_long": policy, "loss_on": "all"})
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
    params = Render.model_validate({"held_out": 0.0, "max_tokens": 40, "too_long": policy, "loss_on": "all"})
    with pytest.raises(BadData) as caught:
        render_rows([chat("good", "hi"), record], tokenizer, params)
    assert caught.value.what == "1 rows cannot be rendered"
    assert caught.value.examples[0].startswith("bad: ")
    assert said in caught.value.examples[0]
