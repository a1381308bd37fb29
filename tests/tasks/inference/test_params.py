from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tasks.core.errors import BadParams
from tasks.inference.params import GREEDY, generation_of
from tasks.orchestration.params import load_params
from tests.conftest import ROOT

BAD = [
    ({"temperature": -0.5}, "temperature: Input should be greater than or equal to 0"),
    ({"temperature": float("nan")}, "temperature: Input should be"),
    ({"temperature": float("inf")}, "temperature: Input should be a finite number"),
    ({"temperature": 1e-4}, "temperature must be 0, which is greedy, or at least 0.001"),
    ({"temperature": "hot"}, "temperature: Input should be a valid number"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p: Input should be greater than 0"),
    ({"temperature": 1.0, "top_p": 1.5}, "top_p: Input should be less than or equal to 1"),
    ({"temperature": 1.0, "top_k": -1}, "top_k: Input should be greater than or equal to 0"),
    ({"temperature": 1.0, "top_k": 1.5}, "top_k: Input should be a valid integer"),
    ({"top_p": 0.9}, "top_k and top_p need a temperature above 0"),
    ({"top_k": 5}, "top_k and top_p need a temperature above 0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty: Input should be greater than 0"),
    ({"repetition_penalty": -1.0}, "repetition_penalty: Input should be greater than 0"),
    ({"repetition_range": -1}, "repetition_range: Input should be greater than or equal to 0"),
    ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
    ({"seed": 2**32}, "seed: Input should be less than 4294967296"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_a_bad_option_is_refused_by_its_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadParams) as caught:
        generation_of(options, "here")
    assert str(caught.value).startswith("here: text cannot be generated like this")
    assert said in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(("options", "said"), BAD)
def test_params_refuse_it_with_its_path(tmp_path: Path, options: dict[str, object], said: str) -> None:
    yaml = YAML()
    content = yaml.load(ROOT / "recipes" / "quickstart.yaml")
    content["evaluate"]["generation"] = options
    yaml.dump(content, tmp_path / "params.yaml")
    with pytest.raises(BadParams) as caught:
        load_params(tmp_path / "params.yaml")
    assert "evaluate.generation" in str(caught.value)
    assert said in str(caught.value)


def test_all_bad_options_are_told_at_once() -> None:
    with pytest.raises(BadParams) as caught:
        generation_of({"top_p": 2.0, "top_k": -1, "repetition_penalty": 0.0}, "here")
    assert [example.split(":")[0] for example in caught.value.examples] == ["top_k", "top_p", "repetition_penalty"]


def test_what_is_not_asked_for_is_greedy() -> None:
    assert generation_of({}, "here") == GREEDY
    drawn = generation_of({"temperature": 1, "top_k": 3}, "here")
    assert drawn == GREEDY.model_copy(update={"temperature": 1.0, "top_k": 3})
    assert load_params(ROOT / "recipes" / "quickstart.yaml").evaluate.generation == GREEDY.model_copy(
        update={"seed": 1}
    )
