"""Versions of a registry in memory: which answers, and how an alias is followed."""

from __future__ import annotations

import gc
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from flows.serve import routing
from flows.serve.errors import ApiError
from flows.serve.record import Record
from flows.serve.routing import Models, Plan, adapter_of, canary_of, in_share
from flows.serve.server import Options, make_service
from flows.serve.versions import LoadedVersion, Reference, Settings, Slot, Source, reference_of
from tasks.adapters.package import package
from tasks.core.artifacts import atomic_folder
from tasks.core.errors import BadData, BadModel, BadParams
from tasks.core.records import Message
from tasks.inference.chat import answer
from tasks.models.loader import load_model
from tasks.registry.client import connect
from tasks.registry.versions import fetch_model, version_of
from tests.flows.serve.registry import MODEL, give
from tests.flows.serve.serving import listening
from tests.tasks.adapters.test_files import as_stage_writes, published

CHAMPION = reference_of(f"models:/{MODEL}@champion")


class Said(list[str]):
    """What a server says, in one text."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def __str__(self) -> str:
        return "\n".join(self)


@pytest.fixture
def slot(workspace: Path) -> Iterator[Slot]:
    found = Slot(Source(CHAMPION, workspace, {}, Settings()), Said())
    found.begin()
    yield found
    found.close(finish=True)


# --- following an alias -----------------------------------------------------------------------------------------------


def test_an_alias_is_followed_forward_and_back(slot: Slot, workspace: Path) -> None:
    assert slot.current is not None
    assert slot.current.fingerprint == f"{MODEL}/1"
    for number in (3, 2):
        give(workspace, champion=number)
        slot.follow()
        assert slot.current.fingerprint == f"{MODEL}/{number}"
    before = slot.current
    slot.follow()
    assert slot.current is before  # nothing is loaded again


def test_what_has_begun_ends_on_the_old_version_which_is_then_released(slot: Slot, workspace: Path) -> None:
    closed = threading.Event()
    with slot.in_use() as old:
        assert old is not None
        close = old.engine.close

        def noted(*, finish: bool) -> None:
            close(finish=finish)
            closed.set()

        old.engine.close = noted  # type: ignore[method-assign]
        give(workspace, champion=2)
        slot.follow()
        with slot.in_use() as new:
            assert new is not None
            assert (old.fingerprint, new.fingerprint) == (f"{MODEL}/1", f"{MODEL}/2")
        assert not closed.wait(0.2)
        old.probe()  # it still answers
    assert closed.wait(60)


def test_a_version_that_was_replaced_leaves_no_memory_behind(slot: Slot, workspace: Path) -> None:
    assert slot.current is not None
    with slot.in_use() as old:
        assert old is not None
        old.grammars.constraint({"type": "object"})
        kept = weakref.ref(old.engine)
    del old
    give(workspace, champion=2)
    slot.follow()
    for _ in range(1200):
        if kept() is None:
            break
        time.sleep(0.05)
        gc.collect()
    assert kept() is None


def test_a_version_whose_files_were_changed_is_refused_and_the_old_one_stays(slot: Slot, workspace: Path) -> None:
    client = connect(workspace)
    folder = fetch_model(client, version_of(client, MODEL, "2"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    give(workspace, champion=2)
    for _ in range(2):
        slot.follow()
    assert slot.current is not None
    assert slot.current.fingerprint == f"{MODEL}/1"
    assert slot.refused is not None
    assert slot.refused[0] == "2"
    said = str(slot._say)
    assert said.count("version 2 is refused, version 1 stays") == 1
    assert "was changed after it was written" in said
    give(workspace, champion=3)
    slot.follow()
    assert slot.current.fingerprint == f"{MODEL}/3"
    assert slot.refused is None


def test_a_registry_that_cannot_be_read_for_a_while_changes_nothing(
    slot: Slot, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(workspace, champion=2)
    with monkeypatch.context() as patch:
        patch.setattr(slot.source, "newest", lambda: (_ for _ in ()).throw(sqlite3.OperationalError("locked")))
        slot.follow()
        slot.follow()
        assert slot.unreachable == "OperationalError: locked"
        assert slot.number == "1"
    assert str(slot._say).count("the registry is not read") == 1
    slot.follow()
    assert (slot.number, slot.unreachable) == ("2", "")


def test_the_alias_of_a_server_is_followed_while_it_is_asked(
    workspace: Path, pico_base: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request is lost or answered otherwise while versions change; all say which one they are of."""
    monkeypatch.setattr(routing, "POLL_S", 0.05)
    models = Models(Plan([CHAMPION], {}), workspace, Said())
    models.begin()
    expected = answer(load_model(pico_base), tokenizer, [Message("user", "Hello")], 6).text
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}
    versions, wrong = set[str](), list[Any]()
    ended = threading.Event()

    def ask(address: str) -> None:
        while not ended.is_set():
            response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
            if response.status_code != 200 or response.json()["choices"][0]["message"]["content"] != expected:
                wrong.append(response.text)
            versions.add(response.headers["x-temper-version"])

    try:
        with listening(make_service(models, Options())) as address:
            clients = [threading.Thread(target=ask, args=(address,)) for _ in range(3)]
            for client in clients:
                client.start()
            for number in (2, 3, 1):
                give(workspace, champion=number)
                for _ in range(1200):
                    if httpx.get(f"{address}/health").json()["models"][0]["version"] == f"{MODEL}/{number}":
                        break
                    time.sleep(0.05)
                else:
                    pytest.fail(f"version {number} was never served")
            ended.set()
            for client in clients:
                client.join()
    finally:
        models.close(finish=True)
    assert wrong == []
    assert versions == {f"{MODEL}/{number}" for number in (1, 2, 3)}


def test_what_cannot_be_served_ends_the_command(workspace: Path, tmp_path: Path) -> None:
    for alias, said in (("nobody", "nothing has this alias"), ("champion", "")):
        source = Source(reference_of(f"models:/{MODEL}@{alias}"), workspace, {}, Settings())
        found = Slot(source, print)
        if said:
            with pytest.raises(BadParams, match=said):
                found.begin()
    with pytest.raises(BadParams, match="no such version"):
        Slot(Source(reference_of(f"models:/{MODEL}/99"), workspace, {}, Settings()), print).begin()
    with pytest.raises(BadParams, match="is no model"):
        reference_of(str(tmp_path / "nothing"))
    with pytest.raises(BadParams, match="is no model"):
        reference_of("models:/a b@champion")


# --- folders and adapters ---------------------------------------------------------------------------------------------


def test_a_folder_is_checked_by_its_manifest(pico_base: Path, tmp_path: Path) -> None:
    folder = as_stage_writes(pico_base, tmp_path / "mine", kind="local")
    source = Source(Reference(str(folder)), None, {}, Settings())
    loaded = source.load("")
    assert loaded.fingerprint.startswith("mine@")
    loaded.release()
    (folder / "config.json").write_text("{}")
    with pytest.raises(BadData, match="was changed after it was written"):
        source.load("")


def test_a_packaged_adapter_is_served_as_it_was_given(pico_base: Path, tmp_path: Path) -> None:
    adapter = published(pico_base, "loreft", tmp_path / "trained")
    with atomic_folder(tmp_path / "model") as draft:
        package(pico_base, adapter, draft, tmp_path / "model")
    loaded = Source(Reference(str(tmp_path / "model")), None, {}, Settings()).load("")
    loaded.release()
    with pytest.raises(BadModel, match="has an adapter of its own"):
        LoadedVersion("x", tmp_path / "model", {"more": adapter}, Settings(), any_base=True)


# --- which version answers --------------------------------------------------------------------------------------------


def test_a_share_is_the_same_every_time_and_as_large_as_it_says() -> None:
    names = [f"user {number}" for number in range(20_000)]
    small = {name for name in names if in_share(name, 0.05)}
    large = {name for name in names if in_share(name, 0.2)}
    assert small < large
    assert abs(len(small) / len(names) - 0.05) < 0.006  # four standard deviations of a binomial share
    assert abs(len(large) / len(names) - 0.2) < 0.012


def route(models: Models, name: str, conversation: str) -> tuple[str, str]:
    with models.chosen(name, conversation) as chosen:
        return chosen.version.fingerprint, chosen.route


def test_a_canary_answers_its_share_and_a_shadow_nobody(workspace: Path, tmp_path: Path) -> None:
    give(workspace, challenger=2, next=3)
    kept = Record(tmp_path / "said.db")
    plan = Plan([CHAMPION], {}, canary=("challenger", 0.5), shadow="next")
    models = Models(plan, workspace, print)
    models.begin()
    routes = {user: route(models, MODEL, user) for user in map(str, range(20))}
    for user, found in routes.items():
        assert found == ((f"{MODEL}/2", "canary") if in_share(user, 0.5) else (f"{MODEL}/1", "served"))
    assert len(set(routes.values())) == 2
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    with listening(make_service(models, Options(), kept)) as address:
        for user, (version, _) in routes.items():
            response = httpx.post(f"{address}/v1/chat/completions", json={**body, "user": user}, timeout=60)
            assert response.json()["system_fingerprint"] == response.headers["x-temper-version"] == version
    models.close(finish=True)
    kept.close()
    with sqlite3.connect(tmp_path / "said.db") as database:
        rows = database.execute("select route, version, id from conversations").fetchall()
    seen = {name for kind, _, name in rows if kind != "shadow"}
    assert len(seen) == 20
    shadows = [(version, name) for kind, version, name in rows if kind == "shadow"]
    assert shadows  # not while others wait
    assert all(version == f"{MODEL}/3" and name.removesuffix("-shadow") in seen for version, name in shadows)


def test_a_challenger_may_come_and_go(workspace: Path) -> None:
    models = Models(Plan([CHAMPION], {}, canary=("challenger", 1.0)), workspace, Said())
    with ExitStack() as stack:
        models.begin()
        stack.callback(models.close, finish=True)
        models._ended.set()  # this test follows by itself
        beside = models._beside["canary"]
        assert route(models, MODEL, "x") == (f"{MODEL}/1", "served")
        give(workspace, challenger=2)
        beside.follow()
        assert route(models, MODEL, "x") == (f"{MODEL}/2", "canary")
        give(workspace, challenger=1)
        beside.follow()
        assert route(models, MODEL, "x") == (f"{MODEL}/1", "served")  # it is the champion itself
        give(workspace, challenger=None)
        beside.follow()
        assert beside.current is None
        assert route(models, MODEL, "x") == (f"{MODEL}/1", "served")


def test_health_tells_what_was_refused(workspace: Path) -> None:
    client = connect(workspace)
    folder = fetch_model(client, version_of(client, MODEL, "2"))
    (folder / "config.json").unlink()
    models = Models(Plan([CHAMPION], {}), workspace, Said())
    models.begin()
    models._ended.set()  # this test follows by itself
    give(workspace, champion=2)
    models._slots[MODEL].follow()
    with listening(make_service(models, Options())) as address:
        (told,) = httpx.get(f"{address}/health").json()["models"]
    models.close(finish=True)
    assert (told["from"], told["route"], told["version"]) == (f"models:/{MODEL}@champion", "served", f"{MODEL}/1")
    assert told["refused"]["version"] == "2"
    assert "config.json: is missing" in told["refused"]["why"] or "was changed" in told["refused"]["why"]


def test_models_have_names_of_their_own(workspace: Path, pico_base: Path) -> None:
    second = reference_of(f"models:/{MODEL}/3")
    models = Models(Plan([CHAMPION, second, Reference(str(pico_base))], {}), workspace, print)
    models.begin()
    try:
        assert models.names() == [MODEL, f"{MODEL}/3", "base"]
        assert route(models, MODEL, "")[0] == route(models, f"{MODEL}@champion", "")[0] == f"{MODEL}/1"
        assert route(models, f"{MODEL}/3", "")[0] == f"{MODEL}/3"
        for name in (f"{MODEL}/2", "models:/x@y", str(pico_base)):
            with pytest.raises(ApiError) as caught:
                route(models, name, "")
            assert caught.value.status == 404
    finally:
        models.close(finish=True)
    for plan, said in (
        (Plan([CHAMPION, CHAMPION, CHAMPION], {}), "name of two models"),
        (Plan([Reference(str(pico_base))], {"base": pico_base}), "name of two models"),
        (Plan([Reference(str(pico_base))], {}, shadow="challenger"), "stands beside a model of the registry"),
    ):
        with pytest.raises(BadParams, match=said):
            Models(plan, workspace, print)


def test_words_of_the_command_line() -> None:
    assert adapter_of("mine=models:/a@b") == ("mine", "models:/a@b")
    assert canary_of("challenger=0.05") == ("challenger", 0.05)
    for text in ("mine", "a b=x", "=x", "mine="):
        with pytest.raises(BadParams, match="is no adapter with a name"):
            adapter_of(text)
    for text in ("challenger", "challenger=0", "challenger=2", "=0.5", "challenger=nan", "challenger=much"):
        with pytest.raises(BadParams, match="is no share"):
            canary_of(text)
