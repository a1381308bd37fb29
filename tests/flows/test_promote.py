"""Promotion and rollback of registered versions, in MLflow and in Prefect."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from bench.registered import made, model_and_sources, workspace_at
from flows.promote import promote as promote_flow
from flows.registry import history
from flows.registry.evidence import broken
from flows.registry.promotion import judge, promote, refuse, rollback
from flows.registry.waiting import Waiting, waiting
from tasks.core.artifacts import digests
from tasks.core.errors import AliasMoved, BadModel, BadParams, GateRefused
from tasks.register.stage import register
from tasks.registry import names as tag
from tasks.registry.alias_log import move_champion, moves, withdrawn
from tasks.registry.client import connect
from tasks.registry.versions import fetch_model, version_at, version_of
from tests.conftest import DEAD

MODEL = "temper-tiny"
RIGHT = {"1": 150, "2": 190, "3": 20}
"""How many of 200 held-out rows each version answers."""


@pytest.fixture(scope="module")
def registered(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with three versions and no champion."""
    folder = tmp_path_factory.mktemp("registered")
    workspace = workspace_at(folder / "workspace")
    for number, right in RIGHT.items():
        (folder / number).mkdir()
        outputs = made(folder / number, pico_base, right)
        version = register(workspace, "qlora", outputs, f"content-{number}", *model_and_sources(workspace))
        assert str(version.version) == number
    return workspace


@pytest.fixture
def workspace(registered: Path, tmp_path: Path) -> Path:
    """A copy to promote in, with artifacts of its own."""
    target = tmp_path / "workspace"
    shutil.copytree(registered, target)
    return target


def champion(workspace: Path) -> str:
    return str(version_at(connect(workspace), f"models:/{MODEL}@champion").version)


def test_a_version_that_passes_becomes_champion_and_its_verdict_is_kept(workspace: Path) -> None:
    done = promote(workspace, "1", "the first")
    assert (done.champion, done.moved, done.passed) == ("1", True, True)
    assert champion(workspace) == "1"
    client = connect(workspace)
    (move,) = moves(client, MODEL)
    assert (move.reason, move.before, move.to) == ("the first", "", "1")
    version = version_of(client, MODEL, "1")
    assert done.verdict is not None
    assert version.tags[tag.VERDICT_DIGEST] == move.verdict == done.verdict.digest()
    kept = json.loads(version.tags[tag.VERDICT])
    assert kept == done.verdict.as_dict()
    (found,) = [each["difference"] for each in kept["findings"] if each["check"] == "against base"]
    assert (found["items"], found["new"], found["old"]) == (200, 0.75, 0.0)
    path = client.download_artifacts(
        str(version.run_id), f"verdicts/version-1-{move.verdict[:12]}.json", str(workspace)
    )
    assert json.loads(Path(path).read_text()) == kept
    assert promote(workspace, "1").findings == ["it is champion already"]


def test_a_version_that_fails_moves_nothing_and_says_why(workspace: Path) -> None:
    promote(workspace, "2")
    done = promote(workspace, "3")
    assert (done.champion, done.moved, done.passed) == ("2", False, False)
    assert done.verdict is not None
    assert [finding.check for finding in done.verdict.findings if not finding.passed] == ["against champion"]
    assert champion(workspace) == "2"
    assert len(moves(connect(workspace), MODEL)) == 1
    told = {each["version"]: each["passed"] for each in history.history(workspace)["versions"]}
    assert told == {"1": None, "2": True, "3": False}


def test_a_rollback_restores_the_same_bytes(workspace: Path) -> None:
    """A hundred: python -m bench.registry rollback"""
    client = connect(workspace)
    promote(workspace, "1")
    before = digests(fetch_model(client, version_at(client, f"models:/{MODEL}@champion")))
    for _ in range(3):
        promote(workspace, "2")
        done = rollback(workspace, None, "not good")
        assert (done.champion, done.moved) == ("1", True)
        assert digests(fetch_model(client, version_at(client, f"models:/{MODEL}@champion"))) == before
    assert [move.action for move in moves(client, MODEL)] == ["promote", *["promote", "rollback"] * 3]


@pytest.mark.parametrize("version", ["0", "-1", "999", "one", "2\n"])
def test_a_version_that_is_not_there_is_refused(workspace: Path, version: str) -> None:
    """Row 79."""
    said = r"version .* does not exist \(latest 3\)"
    with pytest.raises(BadParams, match=said):
        promote(workspace, version)
    with pytest.raises(BadParams, match=said):
        rollback(workspace, version)
    assert moves(connect(workspace), MODEL) == []


def test_a_rollback_without_a_past_is_refused(workspace: Path) -> None:
    """Row 79."""
    with pytest.raises(BadParams, match="no earlier version to roll back to"):
        rollback(workspace)
    promote(workspace, "1")
    with pytest.raises(BadParams, match="no earlier version to roll back to"):
        rollback(workspace)


def test_only_what_was_champion_comes_back(workspace: Path) -> None:
    """Row 79: the gate cannot be gone around."""
    promote(workspace, "1")
    assert not promote(workspace, "3").passed
    for version in ("2", "3"):
        with pytest.raises(GateRefused, match=f"version {version} was not champion before"):
            rollback(workspace, version)
    with pytest.raises(GateRefused, match="version 1 is champion already"):
        rollback(workspace, "1")
    assert champion(workspace) == "1"


def test_two_promoters_cannot_both_win(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one moves the alias while this one reads the files of its version."""
    client = connect(workspace)
    promote(workspace, "1")

    def slowly(*given: object) -> str:
        move_champion(client, MODEL, moves(client, MODEL), "promote", "2")
        return ""

    monkeypatch.setattr("flows.registry.promotion.broken", slowly)
    with pytest.raises(AliasMoved, match="alias moved from v1 to v2 meanwhile"):
        promote(workspace, "2")
    assert [move.to for move in moves(client, MODEL)] == ["1", "2"]


class Dying:
    """A client whose process is killed after one of its requests was answered, which is before the next one."""

    def __init__(self, client: Any, at: int) -> None:
        self._client, self._left = client, at

    def __getattr__(self, name: str) -> Any:
        def ask(*given: Any, **named: Any) -> Any:
            found = getattr(self._client, name)(*given, **named)
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
            return found

        return ask if callable(getattr(self._client, name)) else getattr(self._client, name)

    def of(self, workspace: Path) -> Dying:
        """Stands for `connect`."""
        return self


def test_a_kill_at_any_request_leaves_a_champion_that_passed_and_the_next_try_completes_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At random moments, a hundred times: python -m bench.registry promote"""
    client = connect(workspace)
    promote(workspace, "1")
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr("flows.registry.promotion.connect", Dying(client, kills + 1).of)
            try:
                promote(workspace, "2")
            except KeyboardInterrupt:
                kills += 1
            else:
                break
        assert champion(workspace) in ("1", "2")
        assert promote(workspace, "2").champion == champion(workspace) == "2"
        rollback(workspace)
        assert champion(workspace) == "1"
    assert kills > 10
    ledger = moves(client, MODEL)
    assert [(a.to, b.before) for a, b in pairwise(ledger) if a.to != b.before] == []
    assert len(ledger) == 1 + 2 * kills + 1


def test_what_was_changed_after_it_was_registered_is_not_promoted_nor_rolled_back_to(
    pico_base: Path, tmp_path: Path
) -> None:
    workspace = workspace_at(tmp_path / "workspace")
    client = connect(workspace)
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        register(
            workspace,
            "qlora",
            made(tmp_path / number, pico_base, RIGHT[number]),
            number,
            *model_and_sources(workspace),
        )
    promote(workspace, "1")
    weights = fetch_model(client, version_of(client, MODEL, "2")) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "was changed after it was written" in broken(client, version_of(client, MODEL, "2"))
    done = promote(workspace, "2")
    assert done.verdict is not None
    assert [finding.check for finding in done.verdict.findings if not finding.passed] == ["files"]
    content[-1] ^= 1
    weights.write_bytes(content)
    assert promote(workspace, "2").passed
    first = fetch_model(client, version_of(client, MODEL, "1")) / "config.json"
    first.write_text(first.read_text() + " ")
    with pytest.raises(BadModel, match="its files are not what was registered"):
        rollback(workspace)
    assert champion(workspace) == "2"


def test_results_that_are_not_the_versions_own_are_refused(workspace: Path, tmp_path: Path) -> None:
    """Row 76, at the gate."""
    client = connect(workspace)
    one, two = (version_of(client, MODEL, number) for number in ("1", "2"))
    client.set_model_version_tag(
        MODEL, "2", tag.digest_of("examples.parquet"), one.tags[tag.digest_of("examples.parquet")]
    )
    with pytest.raises(BadParams, match="these are not the results that were registered"):
        promote(workspace, "2")
    client.delete_model_version_tag(MODEL, "2", tag.REPORT)
    with pytest.raises(BadParams, match="was registered without a report"):
        promote(workspace, "2")
    assert two.tags[tag.REPORT] != one.tags[tag.REPORT]


def test_compare_tells_the_paired_gain(workspace: Path) -> None:
    found = history.compare(workspace, "1", "2")
    score = found["suites"]["held_out"]["score"]
    assert (score["items"], score["first"], score["second"]) == (200, 0.75, 0.95)
    assert score["gain"] == pytest.approx(0.2)
    assert score["low"] < 0.2 < score["high"]
    assert found["suites"]["held_out"]["loss"]["counted"] == 0


def test_lineage_goes_from_a_version_to_its_rows(workspace: Path) -> None:
    promote(workspace, "2", "better")
    found = history.lineage(workspace, f"models:/{MODEL}@champion")
    assert found == history.lineage(workspace, "2")
    assert found["key"] == "content-2"
    assert found["data"]["rendered"] == {"train/chat.parquet": "0" * 64}
    assert found["data"]["sources"]["chats"] == {"kind": "generator", "use": "train", "licence": "Apache-2.0"}
    assert found["data"]["rows"]["train"] == {"chat": 1}
    assert found["verdict"]["passed"] is True
    assert [(move["to"], move["reason"]) for move in found["moves"]] == [("2", "better")]
    client = connect(workspace)
    folder = fetch_model(client, version_of(client, MODEL, "2"))
    assert found["files"] == digests(folder)
    with pytest.raises(BadParams, match="the registry has no such version"):
        history.lineage(workspace, f"models:/{MODEL}@nobody")


# --- a person's word --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def ask_a_person(workspace: Path, timeout_s: int) -> None:
    file, yaml = workspace / "params.yaml", YAML(typ="safe")
    content = yaml.load(file)
    content["promote"] |= {"approval": "human", "approval_timeout_s": timeout_s}
    yaml.dump(content, file)


def answering(workspace: Path, answer: bool, note: str) -> threading.Thread:
    """Answers as a person would, as soon as a flow run waits."""
    from prefect.client.orchestration import get_client

    from flows.registry.approval import approve

    def work() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with get_client(sync_client=True) as client:
                paused = [run for run in client.read_flow_runs() if run.state and run.state.is_paused()]
            if paused:
                (note_of_it,) = waiting(workspace)
                assert (note_of_it.run, note_of_it.version) == (str(paused[0].id), "1")
                approve(note_of_it.run, approved=answer, note=note, by="alice")
                return
            time.sleep(0.2)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_promotion_waits_for_a_persons_word(prefect: None, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.registry.approval.POLL_S", 0.2)
    ask_a_person(workspace, 100)
    for answer, note, champion_then in ((False, "wait for Monday", None), (True, "looks good", "1")):
        thread = answering(workspace, answer, note)
        done = promote_flow(workspace, "1", "retrained")
        thread.join()
        assert done.champion == champion_then
        assert done.passed == done.moved == answer
        assert waiting(workspace) == []
    refusal, move = moves(connect(workspace), MODEL)
    assert (refusal.action, refusal.before, refusal.to) == ("refuse", "", "1")
    assert refusal.reason == "retrained; refused by alice; wait for Monday"
    assert (move.action, move.reason) == ("promote", "retrained; approved by alice; looks good")
    assert refusal.verdict == move.verdict
    shown = artifacts("verdict")
    assert len(shown) == 2
    assert "against base" in shown[0]


def artifacts(key: str) -> list[str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return [str(each.data) for each in found]


def test_a_promotion_that_nobody_answers_ends(prefect: None, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.registry.approval.POLL_S", 0.2)
    ask_a_person(workspace, 1)
    with pytest.raises(GateRefused, match="nobody approved of version 1 within 1 s"):
        promote_flow(workspace, "1")
    assert moves(connect(workspace), MODEL) == []


def test_who_has_seen_the_evidence_is_named_and_nobody_else_is_asked(workspace: Path) -> None:
    ask_a_person(workspace, 1)
    seen = judge(workspace, "1")
    assert moves(connect(workspace), MODEL) == []
    assert tag.VERDICT not in version_of(connect(workspace), MODEL, "1").tags
    done = promote(workspace, "1", "better answers", approver="alice")
    assert done.verdict == seen
    (move,) = moves(connect(workspace), MODEL)
    assert (move.by, move.reason, move.verdict) == ("alice", "better answers", seen.digest())


def test_a_refused_version_is_in_the_ledger_and_passed_over_unless_it_is_named(workspace: Path) -> None:
    promote(workspace, "1")
    move = refuse(workspace, "2", "rude", by="alice")
    assert (move.action, move.before, move.to, move.by, move.reason) == ("refuse", "1", "2", "alice", "rude")
    assert champion(workspace) == "1"
    assert withdrawn(moves(connect(workspace), MODEL)) == {"2"}
    with pytest.raises(BadParams, match="is champion already"):
        refuse(workspace, "1")
    assert promote(workspace, "2").champion == "2"
    assert withdrawn(moves(connect(workspace), MODEL)) == set()
    assert rollback(workspace, by="bob").champion == "1"
    assert moves(connect(workspace), MODEL)[-1].by == "bob"


def test_a_note_that_a_kill_left_waits_for_nobody(tmp_path: Path) -> None:
    folder = tmp_path / ".temper" / "approvals"
    folder.mkdir(parents=True)
    note = Waiting("run", MODEL, "1", "", 0.0, DEAD, 0.0)
    (folder / "run.json").write_text(json.dumps(note._asdict()))
    (folder / "cut.json").write_text('{"run"')
    assert waiting(tmp_path) == []


def test_outside_of_a_flow_run_nobody_could_approve(workspace: Path) -> None:
    ask_a_person(workspace, 1)
    with pytest.raises(BadParams, match="needs a flow run"):
        promote(workspace, "1")
