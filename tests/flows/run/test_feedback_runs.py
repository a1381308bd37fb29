"""What people say of answers, from the record to the rows that are trained on."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from flows.run.edit_params import change_params
from flows.run.feedback import feedback_sources, renew, renewed, waiting, was_cut_short
from flows.run.feedback_runs import EVENT, Listener
from flows.run.lock import held, state_folder
from flows.serve.record import open_record
from flows.serve.requests import FeedbackRequest
from tasks.core.errors import BadData, BadParams
from tasks.core.parquet import read_rows
from tasks.ingest.stage import Reading
from tests.conftest import FIRST_RUN, Beside, digests, dvc, git, pico_workspace, temper, wait_for
from tests.flows.serve.test_record import conversation

LEARNING = ["train={kto: {objective: {name: kto}, batch_size: 8, micro_batch_size: 8, epochs: 1}}"]


def vote(workspace: Path, names: range, **said: str) -> None:
    """Records chats that may be learnt from, and a vote on each."""
    with closing(open_record(workspace / "said.db", write=True)) as record:
        for number in names:
            prompt = [{"role": "user", "content": f"What is {number} plus {number}?"}]
            answers = [{"role": "assistant", "content": f"{2 * number}.", "finish_reason": "stop"}]
            name = str(number)
            record.add(conversation(name, prompt=prompt, answers=answers, metadata={"training": "yes"}))
            record.say(FeedbackRequest.model_validate({"id": name, **(said or {"thumb": "up"})}), "ann")


def add_source(workspace: Path, **settings: object) -> None:
    """Writes a source of feedback into params.yaml, as a person would."""
    file, yaml = workspace / "params.yaml", YAML()
    values = yaml.load(file.read_text())
    values["ingest"]["sources"]["said"] = {
        "kind": "feedback",
        "path": "data/feedback",
        "record": "said.db",
        **settings,
    }
    with file.open("w") as out:
        yaml.dump(values, out)


@pytest.fixture(scope="module")
def learnt(clone: Path, pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which `temper run --feedback` has run through once; tests only look at it."""
    workspace = pico_workspace(clone, pico_base, tmp_path_factory.mktemp("learnt") / "work space")
    change_params(workspace, None, LEARNING)
    vote(workspace, range(40))
    vote(workspace, range(40, 60), thumb="down")
    vote(workspace, range(60, 62), better="It is not known.")
    add_source(workspace)
    (workspace / FIRST_RUN).write_text(temper(workspace, "run", "--feedback").stdout)
    return workspace


def trained_on(workspace: Path) -> set[str]:
    """The questions of the source of feedback that are in training or in the held-out rows."""
    rows = read_rows(workspace / "data" / "clean" / "labelled.parquet")
    rendered = [row for file in (workspace / "data" / "rendered").rglob("*.parquet") for row in read_rows(file)]
    ids = {row["id"] for row in rendered}
    return {str(row["prompt"]) for row in rows if row["source"] == "said" and row["id"] in ids}


def test_what_people_say_is_trained_on_and_then_nothing_has_changed(learnt: Path) -> None:
    said = (learnt / FIRST_RUN).read_text()
    assert "said: 2 in chats.jsonl, 60 in labels.jsonl, 2 in preferences.jsonl; 64 are new in data/feedback" in said
    assert len(trained_on(learnt)) == 60
    assert "Data and pipelines are up to date." in dvc(learnt, "status")
    again = temper(learnt, "run", "--feedback").stdout
    assert "0 are new in data/feedback" in again
    assert "nothing has changed since the last run" in again
    assert "data/feedback.dvc" in git(learnt, "status", "--short")  # what a commit pins the snapshot with


# --- snapshots ------------------------------------------------------------------------------------------------------


def test_a_snapshot_changes_when_it_is_renewed_and_dvc_brings_it_back(workspace: Path) -> None:
    vote(workspace, range(3))
    add_source(workspace)
    renew(workspace)
    before = digests(workspace, "data/feedback")
    pointer = (workspace / "data" / "feedback.dvc").read_text()
    vote(workspace, range(3, 5))
    assert waiting(workspace) == 2
    assert digests(workspace, "data/feedback") == before
    (renewal,) = renew(workspace)
    assert (renewal.new, renewal.found.counts()) == (2, {"labels.jsonl": 5})
    assert waiting(workspace) == 0
    after = digests(workspace, "data/feedback")
    assert before != after
    renew(workspace)
    assert digests(workspace, "data/feedback") == after  # nothing in it changes by itself
    (workspace / "data" / "feedback.dvc").write_text(pointer)
    dvc(workspace, "checkout", "data/feedback.dvc")
    assert digests(workspace, "data/feedback") == before


def test_what_is_forgotten_is_in_the_next_snapshot_no_more(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.serve.record.time", SimpleNamespace(time=lambda: time.time() - 40 * 86_400))
    vote(workspace, range(3))
    add_source(workspace)
    assert renew(workspace)[0].found.counts() == {"labels.jsonl": 3}
    add_source(workspace, forget_after=30)
    (renewal,) = renew(workspace)
    assert (renewal.forgotten, renewal.found.counts()) == (3, {})
    assert list((workspace / "data" / "feedback").iterdir()) == [workspace / "data" / "feedback" / "manifest.json"]
    monkeypatch.chdir(workspace)
    assert list(Reading("said", feedback_sources(workspace)["said"]).records()) == []


def test_a_source_says_whose_words_it_takes_and_as_what(workspace: Path) -> None:
    vote(workspace, range(2), better="It is not known.")
    with closing(open_record(workspace / "said.db", write=True)) as record:
        record.add(conversation("x"))
        record.say(FeedbackRequest(id="x", better="Hello."), "ann")
    add_source(workspace, consent={"training": "yes"}, rows=["preferences"])
    (renewal,) = renew(workspace)
    assert renewal.found.counts() == {"preferences.jsonl": 2}
    assert renewal.found.left_out == {"without consent": 1}


def test_a_snapshot_under_other_conditions_is_not_read(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    vote(workspace, range(2))
    add_source(workspace)

    def read() -> list[Any]:
        return list(Reading("said", feedback_sources(workspace)["said"]).records())

    with pytest.raises(BadData, match="is no snapshot of feedback") as missing:
        read()
    assert "temper feedback" in missing.value.fix
    renew(workspace)
    assert [row.label for row in read()] == [True, True]
    add_source(workspace, consent={"training": "yes"})
    with pytest.raises(BadData, match="under other conditions"):
        read()
    renew(workspace)
    assert len(read()) == 2
    (workspace / "data" / "feedback" / "labels.jsonl").write_text("")
    with pytest.raises(BadData, match="was changed after it was written"):
        read()


def test_where_the_record_is_stands_in_params_or_in_the_environment(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadParams, match="names no source of feedback"):
        renew(workspace)
    add_source(workspace, record=None)
    with pytest.raises(BadParams, match="does not say where the record is"):
        renew(workspace)
    vote(workspace, range(2))
    monkeypatch.setenv("TEMPER_RECORD", f"sqlite:///{workspace / 'said.db'}")
    assert renew(workspace)[0].found.counts() == {"labels.jsonl": 2}
    add_source(workspace, record="postgresql://ann:secret-word@h/d")
    with pytest.raises(BadParams, match="password") as caught:
        renew(workspace)
    assert "secret-word" not in str(caught.value)


def test_the_rows_of_a_run_are_not_renewed_under_it(workspace: Path) -> None:
    vote(workspace, range(2))
    add_source(workspace)
    with held(workspace, "temper run"):
        assert "holds the workspace" in temper(workspace, "feedback", code=75).stderr
    assert "2 are new" in temper(workspace, "feedback").stdout


# --- runs that feedback starts --------------------------------------------------------------------------------------


def test_a_run_is_due_when_enough_is_new(workspace: Path) -> None:
    vote(workspace, range(2))
    add_source(workspace)
    listener = Listener(workspace, 3)
    assert listener.due() is None
    vote(workspace, range(2, 4))
    with closing(open_record(workspace / "said.db", write=True)) as record:
        record.say(FeedbackRequest(id="0", thumb="up"), "bob")  # who agrees; that is no new row
    assert listener.due() == 4
    assert listener.due() == 4  # none has been made
    listener.made()
    assert listener.due() is None  # the run that was made may fail: it is not made again and again
    vote(workspace, range(4, 7))
    assert listener.due() == 7
    renew(workspace)
    assert listener.due() is None
    vote(workspace, range(7, 10))
    assert listener.due() == 3


def test_a_schedule_that_has_nobody_to_listen_to_says_so_at_once(workspace: Path) -> None:
    words = ("schedule", "--on-feedback", "3")
    assert "names no source of feedback" in temper(workspace, *words, code=65).stderr
    add_source(workspace)
    assert "is no record of conversations" in temper(workspace, *words, code=65).stderr
    assert "is said where a schedule is served" in temper(workspace, *words, "--list", code=65).stderr


def test_none_is_due_while_another_goes_on(workspace: Path) -> None:
    vote(workspace, range(3))
    add_source(workspace)
    listener = Listener(workspace, 1)
    with FileLock(state_folder(workspace) / "lock"):
        assert listener.due() is None
    assert listener.due() == 3


def test_a_run_that_was_cut_short_is_made_once_more(workspace: Path) -> None:
    vote(workspace, range(3))
    add_source(workspace)
    with pytest.raises(KeyboardInterrupt), renewed(workspace):
        raise KeyboardInterrupt  # as a signal ends it, or a kill, after which nothing runs at all
    assert was_cut_short(workspace)
    assert waiting(workspace) == 0
    listener = Listener(workspace, 3)
    assert listener.due() == 0
    listener.made()
    assert listener.due() is None
    with pytest.raises(BadData), renewed(workspace):
        raise BadData("rows that cannot be used")  # which another run would say again
    assert not was_cut_short(workspace)
    with renewed(workspace):
        assert was_cut_short(workspace)
    assert not was_cut_short(workspace)


def test_a_schedule_learns_when_enough_was_said_and_loses_nothing_by_a_kill(learnt: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "a copy"
    shutil.copytree(learnt, workspace, symlinks=True)
    (workspace / ".temper" / "prefect-server.json").unlink(missing_ok=True)
    known = len(trained_on(workspace))

    def api() -> str:
        return str(json.loads((workspace / ".temper" / "prefect-server.json").read_text())["api"])

    def asked(path: str, **body: Any) -> Any:
        try:
            return httpx.post(f"{api()}/{path}", json=body, timeout=30).json()
        except (httpx.HTTPError, OSError):
            return []

    with Beside(workspace, "schedule", "--on-feedback", "3") as serving:
        wait_for("deployment", lambda: asked("deployments/filter"), serving)
        vote(workspace, range(100, 103))
        wait_for("run that renews the snapshot", lambda: was_cut_short(workspace), serving)
        wait_for("snapshot", lambda: waiting(workspace) == 0, serving)
        events = {"filter": {"event": {"name": [EVENT]}}}
        wait_for("event", lambda: asked("events/filter", **events)["events"], serving)
        (event,) = asked("events/filter", **events)["events"]
        assert event["payload"] == {"rows": 3}
        serving.process.kill()
        wait_for("end of all", lambda: not serving.left(), serving)
    assert was_cut_short(workspace)
    with Beside(workspace, "schedule", "--on-feedback", "3") as serving:
        wait_for("run that comes to its end", lambda: not was_cut_short(workspace), serving, 300)
        assert len(trained_on(workspace)) == known + 3
        runs = [run for run in asked("flow_runs/filter") if run["name"].startswith("feedback-")]
        assert sorted(run["name"] for run in runs) == ["feedback-0", "feedback-3"]
    assert "Data and pipelines are up to date." in dvc(workspace, "status")
