from __future__ import annotations

from tasks.inference.rows import TokenRow
from tasks.train.examples import mismatched_pairs, reference_sequences, replies_of
from tests.helpers.samples import DPO, KTO, LORA, method


def row(prompt: list[int], reply: list[int]) -> TokenRow:
    return TokenRow(prompt + reply, [False] * len(prompt) + [True] * len(reply), len(prompt))


ROWS = [row([1, 2], [3]), row([4], [5, 6]), row([7, 8, 9], [10, 11, 12])]


def halves(rows: list[TokenRow]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    return {(tuple(r.ids[: r.prompt_tokens]), tuple(r.ids[r.prompt_tokens :])) for r in rows}


def test_every_prompt_gets_the_reply_of_another_row_and_every_reply_is_used() -> None:
    found = halves(mismatched_pairs(ROWS))
    assert {prompt for prompt, _ in found} == {(1, 2), (4,), (7, 8, 9)}
    assert {reply for _, reply in found} == {(3,), (5, 6), (10, 11, 12)}
    assert not found & halves(ROWS)


def test_which_one_does_not_depend_on_the_order_of_rows() -> None:
    assert (
        halves(mismatched_pairs(ROWS))
        == halves(mismatched_pairs(ROWS[::-1]))
        == halves(mismatched_pairs(ROWS[1:] + ROWS[:1]))
    )


def test_none_is_longer_than_the_longest_row_and_the_reply_is_what_is_scored() -> None:
    for found in mismatched_pairs([row([1] * 5, [2]), row([3], [4] * 5)]):
        assert found.tokens <= 6
        assert list(found.mask) == [n >= found.prompt_tokens for n in range(found.tokens)]
    assert {found.tokens for found in mismatched_pairs([row([1] * 5, [2]), row([3], [4] * 5)])} == {6, 2}


def test_a_row_alone_has_no_other() -> None:
    assert mismatched_pairs(ROWS[:1]) == []


def test_a_reference_is_asked_for_rows_and_by_kto_for_mismatched_ones_too() -> None:
    steps = [[(ROWS[0],), (ROWS[1],)], [(ROWS[2],)]]
    assert list(reference_sequences(steps, method(LORA, DPO).objective)) == ROWS
    assert list(reference_sequences(steps, method(LORA, KTO).objective)) == [
        *ROWS[:2],
        *mismatched_pairs(ROWS[:2]),
        ROWS[2],
    ]


def test_of_pairs_all_chosen_replies_come_first() -> None:
    assert replies_of([(ROWS[0], ROWS[1]), (ROWS[2], ROWS[0])]) == [ROWS[0], ROWS[2], ROWS[1], ROWS[0]]
