from __future__ import annotations

import json
from random import Random
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from transformers import PreTrainedTokenizerBase

from flows.serve.errors import ApiError
from flows.serve.json_schema import Grammars

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


def written(grammars: Grammars, schema: dict[str, Any], end: int, random: Random) -> list[int]:
    """What a model writes that knows nothing: any token that is allowed."""
    constraint, ids = grammars.constraint(schema), list[int]()
    while not ids or ids[-1] != end:
        allowed = constraint.allowed()
        choices = allowed.nonzero().flatten().tolist()
        ids.append(end if allowed[end] else random.choice(choices))
        constraint.take(ids[-1])
        assert len(ids) < 2000
    return ids[:-1]


def test_whatever_is_drawn_is_of_the_schema(tokenizer: PreTrainedTokenizerBase, random: Random) -> None:
    grammars = Grammars(tokenizer, len(tokenizer) + 7)
    assert grammars.constraint(PERSON).allowed().shape == (len(tokenizer) + 7,)
    for _ in range(20):
        ids = written(grammars, PERSON, tokenizer.eos_token_id, random)
        jsonschema.validate(json.loads(str(tokenizer.decode(ids))), PERSON)


def test_logits_that_stand_for_no_token_are_never_allowed(tokenizer: PreTrainedTokenizerBase) -> None:
    allowed = Grammars(tokenizer, len(tokenizer) + 7).constraint(PERSON).allowed()
    assert not allowed[len(tokenizer) :].any()


def test_an_answer_may_end_when_it_is_complete_and_not_before(tokenizer: PreTrainedTokenizerBase) -> None:
    constraint = Grammars(tokenizer, len(tokenizer)).constraint({"const": 1})
    end = tokenizer.eos_token_id
    assert not constraint.allowed()[end]
    constraint.take(tokenizer("1", add_special_tokens=False)["input_ids"][0])
    assert constraint.allowed().nonzero().flatten().tolist() == [end]


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "(?=a)"}]
)
def test_a_schema_that_cannot_be_held_is_refused(tokenizer: PreTrainedTokenizerBase, schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        Grammars(tokenizer, len(tokenizer)).constraint(schema)
    assert (caught.value.status, caught.value.param) == (400, "response_format.json_schema.schema")
