"""Options of text generation, typed: one section for evaluation, `temper chat` and requests to a registered model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from tasks.core.errors import BadParams
from tasks.core.params import NotNegative, Positive, Section, Seed

LEAST_TEMPERATURE = 0.001
"""Logits divided by less can leave the range of float32."""


class Generation(Section):
    """Options by which each next token is chosen: the most likely one (greedy), or one sampled by its probability."""

    temperature: NotNegative = 0.0
    """What logits are divided by before a token is drawn; 0 is greedy, with `top_k` and `top_p` off."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Drawn from so many of the likeliest tokens (arXiv:1805.04833); 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Drawn from the fewest tokens that have this probability together (arXiv:1904.09751); 1: from all."""
    repetition_penalty: Positive = 1.0
    """Above 1, tokens that were generated before become less likely (arXiv:1909.05858, 4.1, which has 1.2); 1: none."""
    repetition_range: Annotated[int, Field(ge=0)] = 0
    """How many of the last generated tokens the penalty looks at; 0: all generated ones. It never looks at prompts."""
    seed: Seed = 1
    """Of the draws: the same seed and prompt give the same text, alone or in any batch."""

    @model_validator(mode="after")
    def _temperature_fits(self) -> Generation:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be 0, which is greedy, or at least {LEAST_TEMPERATURE}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p need a temperature above 0; at 0 the likeliest token is always taken")
        return self


GREEDY = Generation(seed=0)
"""How a reply is generated that is asked for with no options."""


def generation_of(asked: Mapping[str, Any], where: str) -> Generation:
    """Build the options of a command line or of a request; what it does not name is as in `GREEDY`.

    Args:
        asked: values by their fields' names.
        where: the origin of the values, for the error.

    Raises:
        BadParams: one or more values are wrong; all of them are named.
    """
    try:
        return Generation.model_validate(GREEDY.model_dump() | dict(asked))
    except ValidationError as error:
        problems = [
            f"{each['loc'][0]}: {each['msg']}; got {each['input']!r}" if each["loc"] else each["msg"]
            for each in error.errors()
        ]
        raise BadParams("text cannot be generated like this", where=where, examples=problems) from error
