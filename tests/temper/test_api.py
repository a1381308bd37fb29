"""Each function of the Python API against the stage or flow that does the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from safetensors.torch import load_file

import temper
from flows.run.edit_params import change_params
from tasks.adapters.attach import attach, load_packaged
from tasks.adapters.params import AnyAdapter
from tasks.core.artifacts import atomic_folder, read_manifest
from tasks.core.parquet import write_rows
from tasks.core.records import Message
from tasks.inference.chat import answer
from tasks.ingest.stage import Reading
from tasks.models.loader import load_model
from tasks.orchestration.params import load_params
from tasks.render.params import Render
from tasks.render.stage import render_rows, rendered_schema
from tasks.tokenization.chat_template import load_tokenizer
from tasks.train.params import AnyObjective
from tasks.train.stage import main
from temper import DPO, KTO, ORPO, SFT, Full, LoRA, QLoRA, ReFT, SimPO
from tests.conftest import ROOT
from tests.helpers.commands import environment
from tests.helpers.samples import file_source, write_lines

SUMS = [(a, b) for a in range(2, 9) for b in range(2, 9)]
QUESTION = "What is 3 plus 4?"
SMALL: dict[str, Any] = {"batch_size": 8, "warmup_steps": 1, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"What is {a} plus {b}?", "reply": str(a + b)} for a, b in SUMS]
    return write_lines(tmp_path_factory.mktemp("rows") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def base(pico_base: Path) -> temper.Base:
    return temper.load_model(pico_base)


@pytest.fixture(scope="module")
def data(chats: Path, base: temper.Base) -> temper.Data:
    return temper.render(temper.read_rows(chats), base)


@pytest.fixture(scope="module")
def lora(base: temper.Base, data: temper.Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = temper.train(base, data, temper.LoRA(rank=2, alpha=4), **SMALL)
    return adapter.save(tmp_path_factory.mktemp("adapters") / "lora")


def test_importing_it_imports_no_library() -> None:
    code = (
        "import sys, temper; temper.TemperError; temper.LoRA; dir(temper);"
        "print({m.partition('.')[0] for m in sys.modules} & "
        "{'torch', 'transformers', 'peft', 'mlflow', 'prefect', 'dvc', 'numpy', 'pyarrow', 'pydantic'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there_and_explained() -> None:
    assert dir(temper) == sorted(temper.__all__)
    for name in temper.__all__:
        assert getattr(temper, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute"):
        temper.__getattr__("nothing")


@pytest.mark.parametrize("kind", [LoRA, QLoRA, ReFT, Full, SFT, ORPO, DPO, SimPO, KTO])
def test_defaults_are_those_of_the_sections(kind: Any) -> None:
    """What params.yaml means by a name alone is what the object means that is made without an argument."""
    section = kind().section()
    union: Any = AnyAdapter if kind in (LoRA, QLoRA, ReFT, Full) else AnyObjective
    assert TypeAdapter(union).validate_python({"name": section["name"]}).model_dump() == section


def test_defaults_are_those_of_the_quickstart() -> None:
    """Of a section the quickstart has; of `train` those of its first method."""
    import inspect

    params = load_params(ROOT / "recipes" / "quickstart.yaml")
    for name, adapter in (("qlora", temper.QLoRA()), ("orpo", temper.QLoRA()), ("reft", temper.ReFT())):
        assert params.train[name].adapter.model_dump() == adapter.section()
    assert params.train["qlora"].objective.model_dump() == temper.SFT().section()
    assert params.train["orpo"].objective.model_dump() == temper.ORPO().section()
    method = params.train["qlora"].model_dump()
    given = {n: p.default for n, p in inspect.signature(temper.train).parameters.items()}
    assert {n: given[n] for n in given if n in method} == {n: method[n] for n in given if n in method} | {
        "adapter": None,
        "objective": None,
        "micro_batch_size": None,  # that of the batch
    }
    render = {n: p.default for n, p in inspect.signature(temper.render).parameters.items() if n in Render.model_fields}
    assert render == params.render.model_dump()


def test_rows_are_those_of_ingest(chats: Path) -> None:
    assert temper.read_rows(chats) == list(Reading("chats", file_source(chats)).records())


def test_rendered_rows_are_those_of_the_stage(chats: Path, pico_base: Path, data: temper.Data) -> None:
    params = Render(held_out=0.1, max_tokens=192, too_long="refuse", loss_on="all")
    records = Reading("chats", file_source(chats)).records()
    expected, _ = render_rows(records, load_tokenizer(pico_base), params)
    assert {("train", kind): rows for kind, rows in data.train.items()} | {
        ("held_out", kind): rows for kind, rows in data.held_out.items()
    } == expected
    assert data.held_out["chat"]


@pytest.mark.parametrize("adapter", [temper.LoRA(rank=2, alpha=4), temper.ReFT(rank=2)], ids=["lora", "reft"])
def test_a_trained_adapter_is_the_stages_to_the_bit(
    adapter: Any,
    workspace: Path,
    base: temper.Base,
    data: temper.Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with atomic_folder(tmp_path / "rendered") as folder:
        for split, kinds in (("train", data.train), ("held_out", data.held_out)):
            (folder / split).mkdir()
            for kind, rows in kinds.items():
                write_rows(folder / split / f"{kind}.parquet", [dict(row) for row in rows], rendered_schema(kind))
    values = {"adapter": adapter.section(), "batch_size": 8, "micro_batch_size": 8, "warmup_steps": 1, "epochs": 1}
    values |= {"learning_rate": SMALL["learning_rate"], "checkpoint_every_steps": 50}
    change_params(workspace, None, [f"train.reft.{name}={json.dumps(value)}" for name, value in values.items()])
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("tasks.core.stage.die_with_owner", lambda: None)
    words = [
        "reft",
        "--base",
        str(base.folder),
        "--rendered",
        str(tmp_path / "rendered"),
        "--out",
        "data/adapters/reft",
    ]
    monkeypatch.setattr(sys, "argv", ["tasks.train", *words])
    main()
    ours, theirs = temper.train(base, data, adapter, **SMALL).save(tmp_path / "ours"), Path("data/adapters/reft")
    read_manifest(ours)
    for name in ("adapter_model.safetensors", "adapter_config.json", "log.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (ours, theirs)]
    assert {key: summaries[1][key] for key in summaries[0]} == summaries[0]


def test_an_interrupted_training_goes_on_to_the_same_bits(base: temper.Base, data: temper.Data, tmp_path: Path) -> None:
    options = {**SMALL, "checkpoints": tmp_path / "checkpoints", "checkpoint_every_steps": 2}
    first = temper.train(base, data, temper.LoRA(rank=2, alpha=4), **options)
    again = temper.train(base, data, temper.LoRA(rank=2, alpha=4), **options)  # from its last checkpoint
    assert again.log == first.log
    first.save(tmp_path / "first"), again.save(tmp_path / "again")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again"))
    assert all(one[name].equal(two[name]) for name in one)


def test_a_merged_model_is_that_of_peft(base: temper.Base, lora: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    temper.merge(base, lora, tmp_path / "merged")
    theirs = PeftModel.from_pretrained(load_model(base.folder, full_precision=True), lora).merge_and_unload()
    expected = dict(theirs.named_parameters())
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert tensor.equal(expected[name].to(tensor.dtype)), name
    with pytest.raises(temper.BadParams, match="exists already"):
        temper.merge(base, lora, tmp_path / "merged")


def test_an_adapter_of_a_quantized_base_is_measured_when_it_is_merged(
    base: temper.Base, data: temper.Data, tmp_path: Path
) -> None:
    temper.train(base, data, temper.QLoRA(rank=2, alpha=4), **SMALL).save(tmp_path / "qlora")
    told = temper.merge(base.folder, tmp_path / "qlora", tmp_path / "merged", max_mean_kl=0.5)
    assert set(told["onto"]) == {"original", "dequantized"}
    with pytest.raises(temper.NotEquivalent):
        temper.merge(base.folder, tmp_path / "qlora", tmp_path / "too far", max_mean_kl=0.0)


def test_replies_have_the_edits_of_reft(base: temper.Base, data: temper.Data, tmp_path: Path) -> None:
    reft = temper.train(base, data, temper.ReFT(rank=2), batch_size=4, epochs=4, learning_rate=2e-2, warmup_steps=1)
    reft.save(tmp_path / "reft")
    expected = answer(
        attach(load_model(base.folder), tmp_path / "reft"), base.tokenizer, [Message("user", QUESTION)], 6
    ).text
    pool = temper.AdapterPool(base.folder)
    pool.load("edits", tmp_path / "reft")
    pool.use("edits")
    loaded = temper.load_model(base.folder, adapter=tmp_path / "reft")
    assert [temper.generate(model, QUESTION, max_tokens=6) for model in (reft, loaded, pool)] == [expected] * 3
    bare = answer(load_packaged(base.folder), base.tokenizer, [Message("user", QUESTION)], 6).text
    pool.off()
    assert temper.generate(base, QUESTION, max_tokens=6) == temper.generate(pool, QUESTION, max_tokens=6) == bare
    assert bare != expected


def test_evaluation_is_that_of_the_command(base: temper.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import temper as command

    monkeypatch.chdir(tmp_path)
    for name in ("exam", "quiz"):
        (tmp_path / f"{name}.csv").write_text("question,A,B,answer\nWhat is 1 plus 2?,3,4,A\nWhat is 2 plus 2?,3,4,B\n")
    found = temper.evaluate(base, suites=["exam.csv", "quiz.csv"])
    told = json.loads(
        command(tmp_path, "evaluate", str(base.folder), "--suite", "exam.csv", "--json", PYTHONPATH=str(ROOT)).stdout
    )
    assert set(found["suites"]) == {"exam", "quiz"}
    assert found["suites"]["exam"] == told["suites"]["exam"]
    assert found["template_sha256"] == told["template_sha256"]
    with pytest.raises(temper.BadParams, match="list of suites"):
        temper.evaluate(base, suites="exam.csv")


def test_an_export_is_that_of_the_flow(base: temper.Base, tmp_path: Path) -> None:
    from flows.files.merge import export_folder

    temper.export(base, tmp_path / "ours", kind="gguf", dtype="q8_0")
    export_folder(base.folder, tmp_path / "theirs", "gguf", "q8_0", 4096, ollama=True)
    assert read_manifest(tmp_path / "ours") == read_manifest(tmp_path / "theirs")


def test_errors_say_what_is_wrong(base: temper.Base, data: temper.Data, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(temper.BadParams, match=r"(?s)QLoRA: .*rank.*got 0"):
        temper.QLoRA(rank=0)
    with pytest.raises(temper.BadParams, match="micro_batch_size must be at most"):
        temper.train(base, data, batch_size=2, micro_batch_size=4)
    with pytest.raises(temper.BadData, match="holds no preference rows"):
        temper.train(base, data, objective=temper.ORPO())
    with pytest.raises(temper.BadParams, match="merge it first"):
        temper.train(temper.load_model(base.folder, adapter=lora), data)
    with pytest.raises(temper.BadParams, match="max_tokens"):
        temper.render([], base, max_tokens=0)
    with pytest.raises(temper.BadParams, match="exists already"):
        temper.train(base, data, temper.LoRA(rank=2), **SMALL).save(lora)
    with pytest.raises(temper.BadModel, match="is not a model folder"):
        temper.load_model(tmp_path / "nothing")


def test_a_workspace_runs_to_its_champion(copy: Path) -> None:
    """In a process of its own, as a script; all is up to date, and the gate was asked before."""
    code = (
        "import os, temper; here = os.getcwd(); run = temper.Workspace('data').run();"
        "assert os.getcwd() == here; print([run.champion, sorted({each.state for each in run.outcomes})])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    status = json.loads(
        subprocess.run(
            [sys.executable, "-m", "flows.cli", "status", "--json"],
            cwd=copy, env=environment(), capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    champion = f"models:/temper-tiny/{status['champion']['version']}"
    assert done.stdout.strip().splitlines()[-1] == str([champion, ["unchanged"]])
