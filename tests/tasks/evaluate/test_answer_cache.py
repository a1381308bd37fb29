from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.core.artifacts import atomic_folder, digest
from tasks.core.errors import BadData
from tasks.evaluate.answer_cache import IDENTITY, AnswerCache, cache_key, parts
from tasks.evaluate.model_under_test import ModelUnderTest
from tasks.evaluate.suites import run_suites
from tasks.reports.items import Item
from tests.helpers.samples import CHOICE, EVALUATE, MULTIPLE, rows_suite, write_lines
from tests.tasks.adapters.test_files import published
from tests.tasks.evaluate.test_suites import ANIMALS

ONE = {"weights": "a", "template": "t"}


def test_what_was_asked_before_is_not_asked_again(tmp_path: Path) -> None:
    journal = AnswerCache(tmp_path, ONE)
    assert journal.recall(["q"], lambda: [[-1.25, True]]) == [[-1.25, True]]
    assert AnswerCache(tmp_path, ONE).recall(["q"], lambda: [[0.0, False]]) == [[-1.25, True]]
    assert AnswerCache(tmp_path, ONE).recall(["other"], lambda: "new") == "new"
    assert AnswerCache(tmp_path, {**ONE, "weights": "b"}).recall(["q"], lambda: "b's") == "b's"
    assert AnswerCache(None, ONE).recall(["q"], lambda: "asked") == "asked"


def test_an_error_is_not_kept(tmp_path: Path) -> None:
    journal = AnswerCache(tmp_path, ONE)
    with pytest.raises(ZeroDivisionError):
        journal.recall(["q"], lambda: 1 // 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.recall(["q"], lambda: float("nan"))
    assert journal.recall(["q"], lambda: 3) == 3


def test_results_of_another_digest_are_refused(tmp_path: Path) -> None:
    """Row 76: whatever way they came there."""
    first, second = AnswerCache(tmp_path, ONE), AnswerCache(tmp_path, {**ONE, "weights": "b"})
    first.recall(["q"], lambda: 1)
    assert first.folder
    assert second.folder
    shutil.copy(first.folder / f"{cache_key(['q'])}.json", second.folder)
    with pytest.raises(BadData, match=f"results belong to digest {first.key[:12]}") as refused:
        second.recall(["q"], lambda: 2)
    assert refused.value.exit_code == 65
    shutil.copy(first.folder / IDENTITY, second.folder)
    with pytest.raises(BadData, match=f"results belong to digest {first.key[:12]}") as refused:
        AnswerCache(tmp_path, {**ONE, "weights": "b"})
    assert refused.value.examples == ("weights: a, here b",)


@pytest.mark.parametrize("damage", ["altered", "cut", "other"])
def test_results_that_were_altered_are_refused(tmp_path: Path, damage: str) -> None:
    journal = AnswerCache(tmp_path, ONE)
    journal.recall(["q"], lambda: [1.5])
    assert journal.folder
    file = journal.folder / f"{cache_key(['q'])}.json"
    text = file.read_text()
    file.write_text({"altered": text.replace("1.5", "9.5"), "cut": text[:-4], "other": "[]"}[damage])
    with pytest.raises(BadData, match=r"altered after they were kept|is no kept result"):
        journal.recall(["q"], lambda: [1.5])


def test_parts_are_whole_groups_longest_first() -> None:
    groups = ["aa", "b", "aa", "cccc", "b", "aa"]
    assert parts([2, 1, 2, 4, 1, 2], groups, 2) == [[3, 0, 2, 5], [1, 4]]
    assert parts([2, 1, 2, 4, 1, 2], groups, 1) == [[3], [0, 2, 5], [1, 4]]
    assert parts([], [], 4) == []


# --- no model ever gets another's score -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", ANIMALS)


def items(model: Path, rows: Path, journals: Path | None, *, chat: bool = False, **changes: Any) -> list[Item]:
    examinee = ModelUnderTest(model, EVALUATE.model_copy(update=changes), journals, chats=True)
    return run_suites(examinee, {"s": rows_suite(rows, CHOICE, MULTIPLE, chat_template=chat)}).items


def test_a_model_that_differs_in_one_byte_gets_its_own_scores(pico_base: Path, rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pico_base, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 0x80  # the sign of the last number
    (other / "model.safetensors").write_bytes(bytes(content))
    first = items(pico_base, rows, tmp_path / "journals")
    second = items(other, rows, tmp_path / "journals")
    assert second == items(other, rows, None)
    assert first == items(pico_base, rows, None)
    assert first != second
    assert len(list((tmp_path / "journals").iterdir())) == 2


def test_the_same_weights_with_another_template_get_their_own_scores(
    pico_base: Path, rows: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pico_base, other)
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(
        template.replace("{%", "{#- x -#}{%", 1).replace("user", "user", 1) + " "
    )
    kept = [items(model, rows, tmp_path / "journals", chat=True) for model in (pico_base, other)]
    assert kept == [items(model, rows, None, chat=True) for model in (pico_base, other)]
    keys = [json.loads((folder / IDENTITY).read_text()) for folder in (tmp_path / "journals").iterdir()]
    assert keys[0]["template"] != keys[1]["template"]


@pytest.mark.parametrize("changes", [{"batch_size": 2}, {"generation": {"temperature": 1.0}}])
def test_other_settings_are_another_identity(pico_base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    params = EVALUATE.model_copy(
        update={k: EVALUATE.generation.model_copy(update=v) if isinstance(v, dict) else v for k, v in changes.items()}
    )
    keys = {ModelUnderTest(pico_base, each, None, chats=True).journal.key for each in (EVALUATE, params)}
    assert len(keys) == 2


def test_an_adapter_is_part_of_the_identity(pico_base: Path, tmp_path: Path) -> None:
    from tests.tasks.adapters.test_attach import trained

    keys = {ModelUnderTest(pico_base, EVALUATE, None, chats=True).journal.key}
    for name in ("lora", "ia3"):
        from tasks.adapters.attach import save_adapter

        (tmp_path / name).mkdir()
        save_adapter(trained(pico_base, name), tmp_path / name)
        keys.add(ModelUnderTest(pico_base, EVALUATE, None, chats=True, adapter=tmp_path / name).journal.key)
    assert len(keys) == 3


def test_a_finished_evaluation_needs_no_model(
    pico_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = items(pico_base, rows, tmp_path)
    monkeypatch.setattr("tasks.evaluate.model_under_test.load_packaged", lambda *_, **__: pytest.fail("loaded"))
    assert items(pico_base, rows, tmp_path) == before


def test_the_weights_of_a_packaged_model_s_base_are_hashed_once(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.adapters.package import package

    with atomic_folder(tmp_path / "base") as draft:
        shutil.copytree(pico_base, draft, dirs_exist_ok=True)
    adapter = published(tmp_path / "base", "loreft", tmp_path / "trained")
    with atomic_folder(tmp_path / "models" / "reft") as draft:
        package(tmp_path / "base", adapter, draft, tmp_path / "models" / "reft")
    hashed = []

    def counted(path: Path, algorithm: str = "sha256") -> str:
        hashed.append(path.resolve())
        return digest(path, algorithm)

    for module in ("core.artifacts", "adapters.files", "evaluate.model_under_test"):
        monkeypatch.setattr(f"tasks.{module}.digest", counted)
    examinee = ModelUnderTest(tmp_path / "models" / "reft", EVALUATE, None, chats=True)
    assert examinee.model.peft_config
    assert hashed.count((tmp_path / "base" / "model.safetensors").resolve()) == 1
