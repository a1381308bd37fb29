from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.comparison.collect import ComparedModels, gather
from flows.comparison.disagreements import disagreements, gains
from flows.comparison.page import COMPARISON_PAGE, comparison_page, publish_comparison, shown, write
from tasks.orchestration.params import load_params
from tests.conftest import ROOT, temper
from tests.helpers.reports import item, items, write_report, write_workspace


class Elements(HTMLParser):
    """What a browser makes of a page: its elements, their attributes, and all its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = list[str](), list[str](), ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with four models in three suites; tests only look at it."""
    return write_workspace(tmp_path_factory.mktemp("comparison") / "work space")


@pytest.fixture
def changed(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(made, tmp_path / "copy")


def table_after(heading: str, source: str) -> str:
    return source.partition(f"<h2>{heading}</h2>")[2].partition("</table>")[0]


def test_everything_is_on_the_page(made: Path) -> None:
    found, text = gather(made), (made / COMPARISON_PAGE).read_text() if write(made).is_file() else ""
    for heading in ("Scores", "Trainings", "Where models differ", "Cost", "Answers", "Forgetting"):
        assert f"<h2>{heading}" in text
    scores = table_after("Scores and gains over the base", text)
    for model in found.models:
        for suite in ("held_out", "agieval", "gsm8k"):
            score = model.metrics["suites"][suite]["score"]
            assert f"<b>{score['mean']:.3f}</b>" in scores
            assert f"[{score['low']:.3f}, {score['high']:.3f}]" in scores
    base, qlora = found.models[0], found.models[1]
    gain = gains(qlora.answers, base.answers, found.params)["gsm8k"].interval
    assert f"▲ {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" in scores
    trainings = table_after("Trainings", text)
    for name in found.methods:
        after = found.trainings[name].summary["held_out_loss_after"]
        assert (
            f'<td><b>{name}</b></td><td>qlora</td><td>sft</td>\n<td class="n">4.600</td>\n<td class="n">{after:.3f}'
            in trainings
        )
    assert text.count("<svg viewBox") == 3 + 5  # keys, whole suites and two of them by task


def test_gains_are_those_of_the_metrics(made: Path) -> None:
    """The paired gain's mean is the difference of the two scores, where all items are common."""
    base, *methods = gather(made).models
    for method in methods:
        for suite, gain in gains(method.answers, base.answers, gather(made).params).items():
            both = [model.metrics["suites"][suite]["score"]["mean"] for model in (method, base)]
            assert gain.interval.mean == pytest.approx(both[0] - both[1])


def test_costs_by_hand(made: Path) -> None:
    """1,234,567 tokens in 154.3 s are 8,001 a second; the weights are 850,000 bytes, 830.1 KiB."""
    found = gather(made)
    costs = table_after("Cost", comparison_page(found))
    row = re.search(r"<tr><td><b>orpo</b></td>\s*(.*?)</tr>", costs, re.DOTALL)
    assert row is not None
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[1])
    expected = ["212,992", "830.1 KiB", "300", "1,234,567", "2.6 min", "8,001"]
    assert cells == [*expected, "31.5 s, 127 tokens/s on cpu"]


def test_it_needs_nothing_beside_it_and_runs_nothing(made: Path) -> None:
    text = comparison_page(gather(made))
    found = Elements(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(found.tags)
    assert not [name for name in found.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "://" not in text
    assert "url(" not in text


def test_the_same_files_give_the_same_bytes(made: Path, changed: Path) -> None:
    assert write(made).read_bytes() == write(changed).read_bytes()
    rows = pq.read_table(changed / "data" / "reports" / "qlora" / "examples.parquet")
    pq.write_table(
        rows.take(list(reversed(range(len(rows))))), changed / "data" / "reports" / "qlora" / "examples.parquet"
    )
    assert write(made).read_bytes() == write(changed).read_bytes()  # nor does the order of rows matter


def test_the_time_of_another_training_is_not_taken_for_this_ones(changed: Path) -> None:
    summary = changed / "data" / "adapters" / "orpo" / "summary.json"
    summary.write_text(summary.read_text().replace("key of orpo", "restored from the cache"))
    found = gather(changed)
    assert [training.seconds for training in found.trainings.values()] == [154.3, None, 154.3]
    assert table_after("Cost", comparison_page(found)).count(">2.6 min</td>") == 2


# --- what is missing --------------------------------------------------------------------------------------------------


def test_a_method_without_a_report_is_named(changed: Path) -> None:
    shutil.rmtree(changed / "data" / "reports" / "reft")
    text = comparison_page(gather(changed))
    assert "No report of reft.</b> It was not evaluated: temper run brings `evaluate@reft` up to date" in text
    assert re.search(r"<td><b>reft</b></td>", table_after("Cost", text))  # it was trained, after all
    assert text.count("<svg viewBox") == 3 + 5


def test_a_report_of_an_earlier_form_is_named(changed: Path) -> None:
    (changed / "data" / "reports" / "orpo" / "metrics.json").write_text(json.dumps({"model": "orpo", "loss": 1.0}))
    assert "No report of orpo.</b> It was evaluated by an earlier temper" in comparison_page(gather(changed))


def test_without_the_base_there_are_scores_and_no_gains(changed: Path) -> None:
    shutil.rmtree(changed / "data" / "reports" / "base")
    text = comparison_page(gather(changed))
    assert "No report of base." in text
    assert "▲" not in table_after("Scores and gains over the base", text)
    assert 'class="reference"' not in text
    assert "<h2>Where models differ</h2>\n<p class" in text


def test_a_workspace_that_has_run_nothing_has_a_page(changed: Path) -> None:
    for folder in ("data", ".temper"):
        shutil.rmtree(changed / folder)
    text = comparison_page(gather(changed))
    assert text.count("No report of ") == 4
    assert "No model was evaluated yet." in text
    assert "No method was trained yet." in text


def test_a_suite_that_one_model_was_not_given_is_an_empty_cell(changed: Path) -> None:
    params = load_params(changed / "params.yaml").evaluate
    rows = [row for row in items("reft", 24, 1) if row["suite"] != "gsm8k"]
    write_report(changed, "reft", rows, params)
    text = comparison_page(gather(changed))
    assert text.count("not evaluated</span>") == 1


def test_what_a_suite_left_out_is_told(changed: Path) -> None:
    report = changed / "data" / "reports" / "orpo" / "metrics.json"
    metrics = json.loads(report.read_text())
    metrics["suites"]["agieval"]["skipped"] = ["lsat_rc", "gaokao"]
    report.write_text(json.dumps(metrics))
    assert "Left out, as there is no data: gaokao, lsat_rc<" in comparison_page(gather(changed))


def test_items_that_are_not_common_are_told(changed: Path) -> None:
    write_report(changed, "reft", items("reft", 30, 1), load_params(changed / "params.yaml").evaluate)
    assert comparison_page(gather(changed)).count("on 24 common items") == 3


# --- hostile content --------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><style>*{display:none}</style>",
    '"><img src=x onerror=alert(1)>',
    "</pre></table></section><h1>Champion</h1>",
    "{{ 7 * 7 }}{% for a in b %}",
    "<!-- ]]> &lt;b&gt; &#x0;",
)


def hostile(changed: Path, said: str) -> ComparedModels:
    """The workspace with an item on which models differ, whose every text is `said`."""
    params = load_params(changed / "params.yaml").evaluate
    for model, prediction in (("base", "no"), ("qlora", said), ("orpo", "no"), ("reft", said + "!")):
        rows = [item("held_out", said, 0, said, said, prediction)]
        write_report(changed, model, rows, params)
    return gather(changed)


@pytest.mark.parametrize("said", HOSTILE)
def test_hostile_texts_are_shown_as_texts(changed: Path, said: str) -> None:
    plain = Elements(comparison_page(hostile(changed, "harmless")))
    text = Elements(comparison_page(hostile(changed, said)))
    assert text.tags == plain.tags  # no element more or less
    assert text.attributes == plain.attributes
    assert text.text.count(said) >= 4  # prompt, target, two answers, and the task's name


def test_what_is_invisible_or_turns_text_around_is_made_visible(changed: Path) -> None:
    said = "a\x00b\x1b[31mc\x7f\u202ed\u200be\ufefff\rg\x85"
    text = comparison_page(hostile(changed, said))
    assert text.count("a␀b␛[31mc␡⟨U+202E⟩d⟨U+200B⟩e⟨U+FEFF⟩f␍g⟨U+0085⟩") >= 4
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u200b]", text)


def test_long_texts_are_shortened_in_the_middle() -> None:
    found = shown("a" * 1000 + "b" * 1000)
    assert found == "a" * 240 + "\n[… 1,280 characters …]\n" + "b" * 480


# --- where it goes ----------------------------------------------------------------------------------------------------


def test_it_is_logged_once_for_the_same_content(changed: Path) -> None:
    from tasks.registry.client import connect

    client: Any = connect(changed)
    runs = {publish_comparison(client, changed, write(changed)).info.run_id for _ in range(2)}
    assert len(runs) == 1
    (run,) = runs
    logged = Path(client.download_artifacts(run, COMPARISON_PAGE.name, str(changed)))
    assert logged.read_bytes() == (changed / COMPARISON_PAGE).read_bytes()
    assert client.get_run(run).data.tags["temper.kind"] == "comparison"
    shutil.rmtree(changed / "data" / "reports" / "reft")
    assert publish_comparison(client, changed, write(changed)).info.run_id != run


def test_the_command_prints_where_the_page_is(changed: Path) -> None:
    said = temper(changed, "page", PYTHONPATH=str(ROOT)).stdout.strip()
    assert Path(said) == changed / COMPARISON_PAGE
    assert Path(said).read_text() == comparison_page(gather(changed))


def test_the_examples_are_the_ones_that_the_rule_chooses(made: Path) -> None:
    found = gather(made)
    chosen = disagreements({model.name: model.answers for model in found.models}, "base")
    assert len(chosen) == 12
    section = comparison_page(found).partition("<h2>Where models differ</h2>")[2].partition("<h2>Cost</h2>")[0]
    shops = re.findall(r"A shop has \d+ \w+ and gets \d+", section)
    assert shops == [re.search(r"A shop has \d+ \w+ and gets \d+", each.item.prompt)[0] for each in chosen]  # type: ignore[index]
    right, wrong = section.count("✓ right"), section.count("✗ wrong")
    assert right == sum(answer.score for each in chosen for answer in each.answers.values())
    assert right + wrong == 12 * 4
