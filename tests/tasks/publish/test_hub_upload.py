"""Pushing to and reading from a hub that runs in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tasks.adapters.attach import attach
from tasks.adapters.files import BASE_FILE, CONFIG, PUBLISHED, WEIGHTS
from tasks.core.artifacts import atomic_folder
from tasks.core.errors import BadData, BadInput, BadModel, BadParams, Transient
from tasks.models.loader import load_model
from tasks.publish.hub_upload import Pushed, push
from tasks.publish.model_card import card
from tasks.registry.adapter_refs import fetch_adapter_ref
from tests.helpers import hub as hubs
from tests.tasks.adapters.test_attach import logits
from tests.tasks.adapters.test_files import published


@pytest.fixture(scope="module")
def adapter(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as `train` writes it, with its manifest and its summary."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    with atomic_folder(folder) as draft:
        published(pico_base, "lora", draft)
        summary: dict[str, Any] = {"steps": 30, "rows": 120, "trainable_parameters": 3584, "held_out_loss_after": 1.25}
        summary["params"] = {"adapter": {"name": "lora", "rank": 2}, "epochs": 1}
        (draft / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    with hubs.running() as running:
        hubs.take_for_the_real_one(running, tmp_path / "home", monkeypatch)
        yield running


def pushed(folder: Path, name: str = "me/adapter", *, private: bool = False) -> Pushed:
    return push(folder, name, private=private, message="m")


def test_what_was_pushed_is_read_back_by_its_commit(
    hub: hubs.Hub, adapter: Path, pico_base: Path, tmp_path: Path
) -> None:
    done = pushed(adapter)
    assert done.changed
    files = hub.repositories["me/adapter"][-1][1]
    assert files.keys() == {*PUBLISHED, "README.md", ".gitattributes"}  # neither log nor manifest
    again = fetch_adapter_ref(f"hub:me/adapter@{done.commit}", tmp_path)
    for name in PUBLISHED:
        assert (again / name).read_bytes() == (adapter / name).read_bytes() == files[name]
    first, second = (attach(load_model(pico_base), folder) for folder in (adapter, again))
    assert torch.equal(logits(first), logits(second))


def test_pushing_the_same_again_changes_nothing_and_something_else_keeps_the_old_commit(
    hub: hubs.Hub, adapter: Path, pico_base: Path, tmp_path: Path
) -> None:
    first = pushed(adapter)
    assert pushed(adapter) == Pushed(first.commit, changed=False)
    assert len(hub.repositories["me/adapter"]) == 2  # as it was made, and the push
    published(pico_base, "loreft", tmp_path / "other")
    second = pushed(tmp_path / "other")
    assert second.changed
    assert second.commit != first.commit
    old = fetch_adapter_ref(f"hub:me/adapter@{first.commit}", tmp_path)
    assert (old / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def test_what_earlier_pushes_left_goes_and_what_is_the_owners_stays(
    hub: hubs.Hub, adapter: Path, pico_base: Path, tmp_path: Path
) -> None:
    owners = {"LICENSE": b"mine", "notes.txt": b"mine", "onnx/model.safetensors": b"mine", "adapter/notes.txt": b"mine"}
    hub.commit("me/it", {".gitattributes": b"", **owners})
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    shutil.copytree(pico_base, whole)
    shutil.copytree(adapter, whole / "adapter")
    shutil.copytree(pico_base, shards)
    (shards / "model.safetensors").rename(shards / "model-00001-of-00001.safetensors")
    index = dict.fromkeys(load_file(whole / "model.safetensors"), "model-00001-of-00001.safetensors")
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    kept = {".gitattributes", *owners}
    for folder, extra in (
        (adapter, []),
        (whole, [f"adapter/{name}" for name in PUBLISHED]),
        (shards, []),
        (adapter, []),
    ):
        commits = len(hub.repositories["me/it"])
        pushed(folder, "me/it")
        assert len(hub.repositories["me/it"]) == commits + 1
        names = PUBLISHED if folder is adapter else [file.name for file in folder.iterdir() if file.is_file()]
        assert hub.repositories["me/it"][-1][1].keys() == kept | {*names, *extra, "README.md"}
    assert not pushed(adapter, "me/it").changed


def test_what_was_fetched_is_there_without_the_hub(hub: hubs.Hub, adapter: Path, tmp_path: Path) -> None:
    done = pushed(adapter)
    first = fetch_adapter_ref(f"hub:me/adapter@{done.commit}", tmp_path)
    hub.fails = 503
    assert fetch_adapter_ref(f"hub:me/adapter@{done.commit}", tmp_path) == first


def test_a_model_folder_is_pushed_with_what_a_model_needs_and_its_adapter(
    hub: hubs.Hub, adapter: Path, pico_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(pico_base, tmp_path / "model")
    shutil.copytree(adapter, tmp_path / "model" / "adapter")
    (tmp_path / "model" / "notes.txt").write_text("private")
    pushed(tmp_path / "model", "me/model")
    files = hub.repositories["me/model"][-1][1]
    assert files["model.safetensors"] == (pico_base / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", f"adapter/{WEIGHTS}", f"adapter/{CONFIG}"} <= files.keys()
    assert "notes.txt" not in files
    assert "README.md" in files


def test_the_card_of_a_merged_model_is_not_its_bases(
    hub: hubs.Hub, adapter: Path, pico_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(pico_base, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\n---\n# The base\n")
    pushed(tmp_path / "model", "me/base")
    assert hub.repositories["me/base"][-1][1]["README.md"] == b"---\n---\n# The base\n"
    found = {"form": "merged onto the original weights", "mean_kl": 0.001, "max_logit_difference": 0.1, "tokens": 9}
    (tmp_path / "model" / "equivalence.json").write_text(json.dumps(found))
    pushed(tmp_path / "model", "me/model")
    text = hub.repositories["me/model"][-1][1]["README.md"].decode()
    assert "| architecture | llama |" in text
    assert "| form | merged onto the original weights |" in text
    assert "The base" not in text


def test_the_card_says_what_is_known(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    commit = "a" * 40
    said = {"name": "owner/base", "revision": commit, "weights_sha256": "b" * 64}
    (tmp_path / "adapter" / BASE_FILE).write_text(json.dumps(said))
    text = card(tmp_path / "adapter")
    head = {"library_name": "peft", "tags": ["temper", "lora"], "base_model": "owner/base"}
    assert vars(ModelCard(text).data).items() >= head.items()
    for line in (f"| base revision | {commit} |", "| trainable parameters | 3584 |", "| held-out loss after | 1.25 |"):
        assert line in text
    assert '"epochs": 1' in text


def test_a_card_of_ones_own_is_kept(hub: hubs.Hub, pico_base: Path, tmp_path: Path) -> None:
    published(pico_base, "lora", tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    pushed(tmp_path / "adapter")
    assert hub.repositories["me/adapter"][-1][1]["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"


def test_private_is_private(hub: hubs.Hub, adapter: Path) -> None:
    pushed(adapter, "me/secret", private=True)
    assert hub.private == {"me/secret"}
    pushed(adapter, "me/secret", private=True)
    before = pushed(adapter, "me/open")
    with pytest.raises(BadInput, match="me/open: is public already"):
        pushed(adapter, "me/open", private=True)
    assert hub.repositories["me/open"][-1][0] == before.commit


def test_the_token_is_told_to_nobody(
    hub: hubs.Hub, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(adapter)
    wrong = "hf_" + "y" * 34
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(BadInput, match="does not know this token") as caught:
        pushed(adapter)
    said = capsys.readouterr()
    for token in (hubs.TOKEN, wrong):
        assert token not in str(caught.value) + said.out + said.err
        assert all(token.encode() not in content for content in hub.repositories["me/adapter"][-1][1].values())


@pytest.mark.parametrize(
    ("name", "status", "error", "said"),
    [
        ("others/adapter", 0, BadInput, "no permission to push there"),
        ("me/adapter", 503, Transient, "the hub is in trouble"),
        ("me/adapter", 429, Transient, "the hub is in trouble"),
        ("me/adapter", 400, BadInput, "the hub refuses it"),
        ("adapter", 0, BadParams, "is no name on the hub"),
    ],
)
def test_a_hub_that_does_not_take_it_is_told_of(
    hub: hubs.Hub, adapter: Path, name: str, status: int, error: type[Exception], said: str
) -> None:
    hub.fails = status
    with pytest.raises(error, match=said):
        pushed(adapter, name)


def test_a_hub_that_does_not_answer_may_do_so_later(
    hub: hubs.Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # it asks again five times
    hub.shutdown()
    hub.server_close()
    with pytest.raises(Transient, match="the hub does not answer") as caught:
        pushed(adapter)
    assert caught.value.exit_code == 75
    with pytest.raises(Transient, match="cannot be fetched") as caught:
        fetch_adapter_ref(f"hub:me/adapter@{'0' * 40}", tmp_path)
    assert caught.value.exit_code == 75


def test_without_a_token_nothing_is_asked(hub: hubs.Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInput, match="there is no token for the hub"):
        pushed(adapter)
    assert hub.asked == []


def test_a_card_that_the_hub_cannot_read_is_refused(hub: hubs.Hub, pico_base: Path, tmp_path: Path) -> None:
    published(pico_base, "lora", tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("no front matter")
    with pytest.raises(BadInput, match="the hub refuses it") as caught:
        pushed(tmp_path / "adapter")
    assert "no front matter" in str(caught.value)


def _not_finite(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = float("inf")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


UNFIT: dict[str, tuple[str, Callable[[Path], object], type[Exception], str]] = {
    "changed": ("adapter", lambda f: _cut(f / WEIGHTS), BadData, "was changed after it was written"),
    "no adapter": ("adapter", _empty, BadModel, "is not a model folder"),
    "no folder": ("adapter", shutil.rmtree, BadModel, "there is no such folder"),
    "torn model": ("model", lambda f: _cut(f / "model.safetensors"), BadModel, "is torn, or no safetensors file"),
    "infinite model": ("model", _not_finite, BadModel, "not finite"),
    "pickled model": (
        "model",
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        BadModel,
        "pickle weights are refused",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_not_fit_to_publish_stays_here(
    hub: hubs.Hub, adapter: Path, pico_base: Path, tmp_path: Path, name: str
) -> None:
    kind, harm, error, said = UNFIT[name]
    shutil.copytree(adapter if kind == "adapter" else pico_base, tmp_path / "it")
    harm(tmp_path / "it")
    with pytest.raises(error, match=said):
        pushed(tmp_path / "it")
    assert hub.asked == []


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "error", "said"),
    [
        ("hub:me/adapter", BadParams, "is not pinned"),
        ("hub:me/adapter@main", BadParams, "got:      main"),
        ("hub:me/adapter@0123abc", BadParams, "40 hexadecimal digits"),
        ("hub:adapter@" + "0" * 40, BadParams, "is no name on the hub"),
        ("hub:me/nothing@" + "0" * 40, BadInput, "the hub has no such model or revision"),
        ("hub:me/adapter@" + "0" * 40, BadInput, "the hub has no such model or revision"),
        ("no/such/folder", BadParams, "there is no such folder"),
    ],
)
def test_references_that_name_nothing(
    hub: hubs.Hub, tmp_path: Path, reference: str, error: type[Exception], said: str
) -> None:
    hub.commit("me/adapter", {CONFIG: b"{}"})
    with pytest.raises(error, match=said):
        fetch_adapter_ref(reference, tmp_path)


def test_a_repository_without_an_adapter_in_safetensors_is_refused(hub: hubs.Hub, tmp_path: Path) -> None:
    commit = hub.commit("me/pickled", {CONFIG: b"{}", "adapter_model.bin": b"\x80\x04."})
    with pytest.raises(BadModel, match="is no adapter that temper reads") as caught:
        fetch_adapter_ref(f"hub:me/pickled@{commit}", tmp_path)
    assert "pickle weights (adapter_model.bin) are refused" in str(caught.value)
    assert not any("adapter_model.bin" in asked for asked in hub.asked)
