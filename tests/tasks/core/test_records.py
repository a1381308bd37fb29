from __future__ import annotations

from tasks.core.records import ChatExample, Message, held_out, normalized_text


def chat(text: str, group: str = "") -> ChatExample:
    return ChatExample(id="1", source="s", group=group, messages=(Message("user", text), Message("assistant", "a")))


def test_equal_prompts_are_one_group_whatever_their_case_width_and_space() -> None:
    assert chat("What is  ２?\n").split_group() == chat("what is 2?").split_group()
    assert chat("What is 2?", group="g").split_group() == "g"


def test_normalising_composes_characters() -> None:
    assert normalized_text("e\u0301") == normalized_text("\u00e9")


def test_the_held_out_share_is_as_asked_and_grows_without_moving_anything() -> None:
    groups = [f"group {n}" for n in range(20_000)]
    tenth = {g for g in groups if held_out(g, 0.1)}
    fifth = {g for g in groups if held_out(g, 0.2)}
    assert abs(len(tenth) / 20_000 - 0.1) < 0.01
    assert tenth < fifth
    assert not any(held_out(g, 0.0) for g in groups)
    assert all(held_out(g, 1.0) for g in groups)


def test_a_known_group_lies_where_it_always_did() -> None:
    """sha256("group 0") begins with 5948c4cf, which is 0x5948c4cf / 2^32 = 0.34877 of the whole range."""
    assert not held_out("group 0", 0.3487)
    assert held_out("group 0", 0.3488)
