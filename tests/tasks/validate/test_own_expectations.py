"""A team's own expectations, on rows whose outcome is read off by hand and by Great Expectations alone."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ruamel.yaml import YAML

from tasks.core.errors import BadData, BadParams
from tasks.core.parquet import as_table
from tasks.core.records import (
    KINDS,
    ChatExample,
    LabelledReply,
    Message,
    PreferencePair,
    Record,
    SeqPair,
    TextExample,
)
from tasks.validate.columns import COLUMNS, TEXT_COLUMNS, column_of_rows
from tasks.validate.decide import ValidationResult, apply_checks
from tasks.validate.feature_cache import FeatureCache
from tasks.validate.own_expectations import own_expectations
from tasks.validate.profile import measure, profile_page
from tasks.validate.row_features import row_features
from tasks.validate.stage import check_share, places_of
from tests.conftest import ROOT
from tests.helpers.commands import run_module
from tests.helpers.samples import validate_params

SPACES = "a" + " " * 30 + "b"
"""Python's engine takes a minute for this text and `(\\s+)+x`: it tries all 2^29 ways to split the spaces."""


def turns(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("user" if place % 2 == 0 else "assistant", text) for place, text in enumerate(texts))


ROWS: list[Record] = [
    ChatExample(
        id="link",
        source="s",
        group="billing",
        messages=turns("What is the way?", "See http://a.org/<b>"),
        tools=("{}",),
    ),
    ChatExample(
        id="long", source="s", messages=(Message("system", "Be kind."), *turns("Hi", "Hello you", "And?", "Ok"))
    ),
    ChatExample(
        id="call",
        source="t",
        messages=(
            Message("user", "How warm is it there?"),
            Message("assistant", "", '[{"name": "f", "arguments": {}}]'),
            Message("tool", "12"),
            Message("assistant", "Twelve <script>alert(1)</script>"),
        ),
    ),
    PreferencePair(
        id="pair", source="s", prompt=turns("你喜欢吃什么水果"), chosen="I like to eat apples", rejected="no"
    ),
    TextExample(id="text", source="s", text=SPACES),
    LabelledReply(id="good", source="s", prompt=turns("is it so?"), reply="yes it is", label=True),
    LabelledReply(id="bad", source="s", prompt=turns("is it not?"), reply="no never", label=False),
    SeqPair(id="pair of texts", source="s", input="translate this", target="übersetze das"),
]
NONE = {each.id: None for each in ROWS}
BY_HAND: dict[str, dict[str, Any]] = {
    "group": NONE | {"link": "billing"},
    "label": NONE | {"good": 1.0, "bad": 0.0},
    "system": NONE | {"long": "Be kind."},
    "rejected": NONE | {"pair": "no"},
    "text": NONE | {"text": SPACES},
    "prompt": {
        "link": "What is the way?",
        "long": "Hi",
        "call": "How warm is it there?",
        "pair": "你喜欢吃什么水果",
        "text": None,
        "good": "is it so?",
        "bad": "is it not?",
        "pair of texts": "translate this",
    },
    "reply": {
        "link": "See http://a.org/<b>",
        "long": "Ok",
        "call": "Twelve <script>alert(1)</script>",
        "pair": "I like to eat apples",
        "text": None,
        "good": "yes it is",
        "bad": "no never",
        "pair of texts": "übersetze das",
    },
    "roles": {
        "link": "ua",
        "long": "suaua",
        "call": "uata",
        "pair": "ua",
        "text": None,
        "good": "ua",
        "bad": "ua",
        "pair of texts": "ua",
    },
    "turns": dict(zip(NONE, (2, 5, 4, 3, 1, 2, 2, 2), strict=True)),
    # without white space; the reply that only calls a tool does not count
    "shortest_turn": dict(zip(NONE, (13, 2, 2, 2, 2, 7, 7, 12), strict=True)),
    "words": dict(zip(NONE, (9, 7, 11, 14, 2, 6, 5, 4), strict=True)),  # of each text by itself
    # of system, user and tool
    "prompt_turns": dict(zip(NONE, (1, 3, 2, 1, None, 1, 1, 1), strict=True)),
    "prompt_characters": dict(zip(NONE, (16, 14, 23, 8, None, 9, 10, 14), strict=True)),
    "prompt_words": dict(zip(NONE, (4, 4, 6, 8, None, 3, 3, 2), strict=True)),
    "calls": NONE | {"link": 0, "long": 0, "call": 1},
    "tools": NONE | {"link": 1} | dict.fromkeys(("long", "call", "pair", "good", "bad"), 0),
    "same_replies": NONE | {"pair": 0},
    "question_script": NONE | {"link": "latin", "call": "latin", "pair": "han"},  # of four words or more
    "reply_script": NONE | {"link": "latin", "call": "latin", "pair": "latin"},  # See http a org b
}
BY_HAND["first_turn"] = BY_HAND["prompt"] | {"long": "Be kind.", "text": SPACES}
BY_HAND["last_turn"] = BY_HAND["reply"] | {"text": SPACES}
BY_HAND["all_text"] = {
    "link": "What is the way?\nSee http://a.org/<b>",
    "long": "Be kind.\nHi\nHello you\nAnd?\nOk",
    "call": "How warm is it there?\n\n12\nTwelve <script>alert(1)</script>",
    "pair": "你喜欢吃什么水果\nI like to eat apples\nno",
    "text": SPACES,
    "good": "is it so?\nyes it is",
    "bad": "is it not?\nno never",
    "pair of texts": "translate this\nübersetze das",
}

REGEX, NO_REGEX = "expect_column_values_to_match_regex", "expect_column_values_to_not_match_regex"
EXPECTATIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "no_links": ({"type": NO_REGEX, "column": "reply", "regex": "https?://"}, {"link"}),
    "short": ({"type": "expect_column_value_lengths_to_be_between", "column": "prompt", "min_value": 3}, {"long"}),
    "teams": ({"type": "expect_column_values_to_be_in_set", "column": "group", "value_set": ["x"]}, {"link"}),
    "grouped": (
        {
            "type": "expect_column_values_to_not_be_null",
            "column": "group",
            "row_condition": 'kind == "chat" and turns > 2',
            "condition_parser": "pandas",
        },
        {"long", "call"},
    ),
    "unlike": (
        {
            "type": "expect_column_pair_values_to_be_equal",
            "column_A": "prompt",
            "column_B": "reply",
            "ignore_row_if": "either_value_is_missing",
            "row_condition": {"type": "comparison", "column": {"name": "kind"}, "operator": "==", "parameter": "pair"},
        },
        {"pair of texts"},
    ),
    "more_words": (
        {"type": "expect_column_pair_values_a_to_be_greater_than_b", "column_A": "turns", "column_B": "calls",
         "ignore_row_if": "either_value_is_missing"},
        set(),
    ),
    "kinds": (
        {"type": f"{REGEX}_list", "column": "kind", "regex_list": ["^c", "^p"], "match_on": "any"},
        {"text", "good", "bad"},
    ),
    "neither": (
        {"type": f"{NO_REGEX}_list", "column": "last_turn", "regex_list": ["^no", "y"]},
        {"bad", "good"},
    ),
    "hopeless": ({"type": NO_REGEX, "column": "text", "regex": r"(\s+)+x"}, set()),
}  # fmt: skip


def tables(rows: list[Record] = ROWS) -> dict[str, Any]:
    return {kind: as_table(kind, [row for row in rows if row.kind == kind]) for kind in KINDS}


def judged(
    expectations: Mapping[str, Any], docs: Path, suites: tuple[str, ...] = (), folder: Path = Path()
) -> ValidationResult:
    """All checks of temper's own are left out, so that what is found is the team's."""
    checks = dict.fromkeys(type(validate_params().checks).model_fields, "ignore")
    params = validate_params(
        checks,
        duplicates={"exact": "ignore", "near": "ignore"},
        expectations=dict(expectations),
        expectation_suites=list(suites),
    )
    own = own_expectations(params, folder)
    return apply_checks(tables(), {}, 0.0, params, docs, FeatureCache(None), own)


def failing(verdict: ValidationResult) -> dict[str, set[str]]:
    """The ids of the rows that each expectation puts into quarantine."""
    found: dict[str, set[str]] = {}
    for row, reasons in verdict.reasons.items():
        for reason in reasons:
            name = re.match(r"expectation ([^:]+): .", reason)
            assert name, reason
            found.setdefault(name[1], set()).add(verdict.facts["id"][row])
    return found


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs")


@pytest.fixture(scope="module")
def verdict(docs: Path) -> ValidationResult:
    """One run of them all, each rejecting, and of `links_counted` and `mean_told`, which only warn."""
    counted = {"type": NO_REGEX, "column": "all_text", "regex": "<", "action": "warn", "mostly": 0.7}
    mean = {"type": "expect_column_mean_to_be_between", "column": "turns", "max_value": 2, "action": "warn"}
    own = {name: given for name, (given, _) in EXPECTATIONS.items()}
    return judged(own | {"links_counted": counted, "mean_told": mean}, docs)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_column_holds_what_its_rows_say_and_null_where_a_kind_has_none(name: str) -> None:
    given = tables()
    ids = column_of_rows(given, "id")
    if name in TEXT_COLUMNS:
        column = column_of_rows(given, name)
    else:
        column = pd.concat([row_features(each, kind) for kind, each in given.items() if len(each)])[name]
    found = {key: None if pd.isna(value) else value for key, value in zip(ids, column, strict=True)}
    assert found == BY_HAND[name]


@pytest.mark.parametrize("name", EXPECTATIONS)
def test_exactly_the_rows_that_fail_go_to_quarantine(verdict: ValidationResult, name: str) -> None:
    assert failing(verdict).get(name, set()) == EXPECTATIONS[name][1]
    assert verdict.outcomes[name].found == len(EXPECTATIONS[name][1])


def test_great_expectations_alone_says_the_same_of_a_table_made_by_hand(verdict: ValidationResult) -> None:
    import great_expectations as gx
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    kinds = {each.id: each.kind for each in ROWS}
    table = pd.DataFrame({"kind": kinds} | {name: BY_HAND[name] for name in ("prompt", "reply", "group", "turns")})
    context = gx.get_context(mode="ephemeral")
    asset = context.data_sources.add_pandas("p").add_dataframe_asset("a")
    batch = asset.add_batch_definition_whole_dataframe("b").get_batch({"dataframe": table})
    for name in ("no_links", "short", "teams", "grouped", "unlike"):
        given = {key: value for key, value in EXPECTATIONS[name][0].items() if key != "type"}
        one = ExpectationConfiguration(type=EXPECTATIONS[name][0]["type"], kwargs=given).to_domain_obj()
        result = batch.validate(one, result_format="COMPLETE").result
        assert set(result["unexpected_index_list"]) == failing(verdict)[name], name


def test_who_warns_counts_and_rejects_nothing(verdict: ValidationResult) -> None:
    assert not {"links_counted", "mean_told"} & failing(verdict).keys()
    counted = verdict.outcomes["links_counted"]
    assert (counted.found, counted.success, counted.rows) == (2, True, [])  # 6 of 8 pass, and 0.7 must
    told = verdict.outcomes["mean_told"]
    assert (told.found, told.success, float(told.observed)) == (0, False, 21 / 8)


def test_reports_have_them_and_take_no_text_for_markup(verdict: ValidationResult, docs: Path) -> None:
    numbers = measure(verdict, validate_params(), {}, places_of(tables()), [])
    assert numbers["checks"]["no_links"]["action"] == "reject"
    assert numbers["checks"]["links_counted"]["found"] == 2
    assert "expectation no_links" in profile_page(numbers)
    pages = "".join(page.read_text() for page in docs.rglob("*.html"))
    assert "https?://" in pages
    assert "Twelve &lt;script&gt;" in pages
    assert "<script>alert(1)" not in pages


def test_mostly_fails_the_stage_where_it_is_said(tmp_path: Path) -> None:
    link = EXPECTATIONS["no_links"][0]  # one of the seven rows that have a reply fails: 0.857 pass
    for name, share in (("unsaid", None), ("enough", 0.85), ("short_of_it", 0.86)):
        said = link if share is None else link | {"mostly": share}
        found = judged({name: said}, tmp_path / name)
        assert failing(found) == {name: {"link"}}
        params = validate_params(max_quarantined=0.5)
        if name == "short_of_it":
            with pytest.raises(BadData, match=r"expectations\.short_of_it: 1 of 8 rows, such as link"):
                check_share(found, places_of(tables()), params)
        else:
            check_share(found, places_of(tables()), params)
            assert found.outcomes[name].success is (name == "enough")


def test_a_whole_column_that_fails_ends_the_stage_with_what_was_observed(tmp_path: Path) -> None:
    """The turns are 1 2 2 2 2 3 4 5: the median is 2, the mean 21 / 8."""
    quantiles = {"quantiles": [0.5], "value_ranges": [[3, None]]}
    wrong = {
        "many": {"type": "expect_table_row_count_to_be_between", "min_value": 9},
        "usual": {
            "type": "expect_column_quantile_values_to_be_between",
            "column": "turns",
            "quantile_ranges": quantiles,
        },
    }
    right = {"mean": {"type": "expect_column_mean_to_be_between", "column": "turns", "max_value": 2.7}}
    found = judged(wrong | right, tmp_path)
    assert not found.reasons
    with pytest.raises(BadData) as caught:
        check_share(found, places_of(tables()), validate_params())
    assert caught.value.exit_code == 65
    told = sorted(caught.value.examples)
    assert [line[: line.index(";")] for line in told] == [
        "validate.expectations.many: observed 8",
        "validate.expectations.usual: observed [2]",
    ]


def test_a_suite_that_great_expectations_wrote_says_the_same(verdict: ValidationResult, tmp_path: Path) -> None:
    import great_expectations as gx
    import great_expectations.expectations as gxe

    suite = gx.ExpectationSuite(
        name="mine",
        expectations=[
            gxe.ExpectColumnValuesToNotMatchRegex(column="reply", regex="https?://", meta={"name": "no_links"}),
            gxe.ExpectColumnValueLengthsToBeBetween(column="prompt", min_value=3, description="a prompt says little"),
            gxe.ExpectColumnValuesToBeInSet(column="group", value_set=["x"], meta={"name": "warned", "action": "warn"}),
        ],
    )
    (tmp_path / "mine.json").write_text(json.dumps(suite.to_json_dict()))
    found = judged({}, tmp_path / "docs", ("mine",), tmp_path)
    unnamed = "expect_column_value_lengths_to_be_between prompt"
    assert failing(found) == {"no_links": {"link"}, unnamed: {"long"}}
    assert any(f"expectation {unnamed}: a prompt says little" in why for why in found.reasons.values())
    assert found.outcomes["warned"].found == 1
    assert found.outcomes["no_links"].expected.where == "data/expectations/mine.json: expectations[0]"


SHAPE = {"type": REGEX, "column": "reply", "regex": "x"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "type": (SHAPE | {"type": "expect_column_values_to_mach_regex"}, f'did you mean "{REGEX}"'),
    "argument": (SHAPE | {"regexx": "x"}, 'no argument "regexx"; did you mean "regex"'),
    "action": (SHAPE | {"actoin": "warn"}, 'did you mean "action"'),
    "column": (SHAPE | {"column": "replay"}, 'no column "replay"; did you mean "reply"(.|\n)*all_text'),
    "no column": ({"type": REGEX, "regex": "x"}, "column: field required"),
    "no regex": ({"type": REGEX, "column": "reply"}, "regex is no pattern"),
    "bad regex": (SHAPE | {"regex": "(a"}, "regular expression is wrong"),
    "lookahead": (SHAPE | {"regex": "(?!a)b"}, "without lookahead"),
    "value": ({"type": "expect_column_values_to_be_between", "column": "turns", "min_value": [1]}, "min_value"),
    "set": ({"type": "expect_column_values_to_be_in_set", "column": "kind", "value_set": "chat"}, "not a valid list"),
    "sql": ({"type": "expect_column_values_to_match_like_pattern", "column": "reply"}, "it runs in a SQL"),
    "query": ({"type": "unexpected_rows_expectation", "unexpected_rows_query": "x"}, "here: it needs a query"),
    "code": (SHAPE | {"row_condition": '@__import__("os").getcwd() == "x"'}, "row_condition is no plain comparison"),
    "hidden code": (
        SHAPE | {"row_condition": {"type": "pass_through", "pass_through_filter": "kind.str.len() > 2"}},
        "row_condition is no plain comparison",
    ),
    "condition": (SHAPE | {"row_condition": "knd == 'chat'"}, 'no column "knd"; did you mean "kind"'),
    "share of a column": ({"type": "expect_table_row_count_to_equal", "value": 3, "mostly": 0.5}, "there is no mostly"),
    "parameter": ({"type": "expect_table_row_count_to_equal", "value": {"$PARAMETER": "x"}}, "PARAMETER has no value"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_before_a_row_is_read(name: str) -> None:
    with pytest.raises(BadParams, match=WRONG[name][1]) as caught:
        own_expectations(validate_params(expectations={"mine": WRONG[name][0]}), Path())
    assert caught.value.where == "validate.expectations.mine"


def test_all_that_is_wrong_is_told_at_once() -> None:
    both = {name: WRONG[name][0] for name in ("type", "column")}
    with pytest.raises(BadParams, match="2 expectations are wrong") as caught:
        own_expectations(validate_params(expectations=both), Path())
    assert [line.partition(":")[0] for line in caught.value.examples] == [
        f"validate.expectations.{name}" for name in both
    ]


def test_a_value_that_does_not_fit_its_column_is_an_error_of_the_user(tmp_path: Path) -> None:
    text = {"type": "expect_column_mean_to_be_between", "column": "reply", "min_value": 1}
    with pytest.raises(BadData, match=r"expectations\.mine: could not be evaluated"):
        judged({"mine": text}, tmp_path)


def test_names_are_given_once_and_suites_are_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="html is the name of a check"):
        validate_params(expectations={"html": SHAPE})
    entry = {"type": REGEX, "kwargs": {"column": "reply", "regex": "x"}, "meta": {"name": "html"}}
    for name, content, why in (
        ("taken", {"expectations": [entry]}, 'the name "html" is taken'),
        ("list", [entry], "is no suite"),
        ("cut", None, "is no suite"),
        ("odd", {"expectations": [entry | {"meta": {"action": "drop"}}]}, "meta.action is unknown"),
    ):
        (tmp_path / f"{name}.json").write_text("{" if content is None else json.dumps(content))
        with pytest.raises(BadParams, match=why):
            own_expectations(validate_params(expectation_suites=[name]), tmp_path)
    with pytest.raises(BadParams, match='no suite "lst"; did you mean "list"'):
        own_expectations(validate_params(expectation_suites=["lst"]), tmp_path)


def test_a_misspelt_expectation_ends_the_stage_with_65_before_it_reads(workspace: Path) -> None:
    file = workspace / "params.yaml"
    content = YAML(typ="safe").load(file)
    content["validate"]["expectations"] = {"mine": WRONG["type"][0]}
    YAML().dump(content, file)
    (workspace / "data" / "raw").mkdir()
    folders = [word for name in ("raw", "clean", "quarantine", "validation") for word in (f"--{name}", f"data/{name}")]
    done = run_module(workspace, "tasks.validate", *folders)
    assert done.returncode == 65
    assert f'did you mean "{REGEX}"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pattern_that_takes_python_a_minute_takes_no_time(tmp_path: Path) -> None:
    started = time.process_time()
    found = judged({"hopeless": EXPECTATIONS["hopeless"][0] | {"column": "all_text"}}, tmp_path)
    assert found.outcomes["hopeless"].success
    assert time.process_time() - started < 10


def test_the_page_has_every_column_and_its_examples_hold() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    section = page.partition("## Your own expectations")[2]
    for name in COLUMNS:
        assert f"`{name}`" in section, name
    params = YAML(typ="safe").load(re.findall(r"```yaml\n(validate:.*?)```", section, re.DOTALL)[0])["validate"]
    shipped = ROOT / "data" / "expectations"
    built = own_expectations(validate_params(**params), shipped)
    assert len(built) == 4 + len(json.loads((shipped / "example.json").read_text())["expectations"])
    suite = json.loads(re.findall(r"```json\n(.*?)```", section, re.DOTALL)[0])
    assert suite["expectations"][0]["type"].startswith("expect_")
