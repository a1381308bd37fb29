"""Names that MLflow would take, or trip over, are refused before anything is asked of it."""

from __future__ import annotations

import pytest

from tasks.core.errors import BadParams
from tasks.core.params_file import read_yaml
from tasks.orchestration.params import check
from tasks.registry.names import method_alias, registry_name
from tests.conftest import ROOT


@pytest.mark.parametrize("name", ["temper-tiny", "a", "Model_1.2", "x" * 100, "0"])
def test_good_names(name: str) -> None:
    assert registry_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a/b", "a:b", "a\n", "\n", "a\nb", "tеmper", "x" * 101, "x" * 300, "a b", ".hidden", "ａ", "a\u200b"]
)
def test_names_of_models_that_are_refused(name: str) -> None:
    """Row 77; one has a Cyrillic letter, one a full-width one, one a space of no width."""
    with pytest.raises(ValueError, match=r"a name may use A-Z a-z 0-9 \. _ -"):
        registry_name(name)
    with pytest.raises(BadParams, match="wrong") as caught:
        check({**read_yaml(ROOT / "params.yaml"), "register": {"model": name}}, "params.yaml")
    assert caught.value.exit_code == 65
    assert any("register.model" in example and "a name may use" in example for example in caught.value.examples)


@pytest.mark.parametrize("alias", ["latest", "v3", "v12", "champion", "challenger"])
def test_a_method_may_not_be_called_like_an_alias_that_means_something_else(alias: str) -> None:
    """Row 78: registering a method called champion would move that alias past the gate."""
    with pytest.raises(ValueError, match=f'alias "{alias}" is reserved'):
        method_alias(alias)
    params = dict(read_yaml(ROOT / "params.yaml"))
    params["train"] = {alias: params["train"]["qlora"]}
    with pytest.raises(BadParams) as caught:
        check(params, "params.yaml")
    assert f'alias "{alias}" is reserved' in str(caught.value)


@pytest.mark.parametrize("alias", ["champion\n", "сhampion", "Best", "a b", "x" * 65, ""])
def test_aliases_of_other_characters_are_refused(alias: str) -> None:
    """Row 78; one has a Cyrillic letter."""
    with pytest.raises(ValueError, match="an alias may use a-z 0-9 _ -"):
        method_alias(alias)


def test_good_aliases() -> None:
    assert [method_alias(alias) for alias in ("qlora", "v", "v3a", "lora_2")] == ["qlora", "v", "v3a", "lora_2"]
