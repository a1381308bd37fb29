"""A registered model is the one that was trained, wherever it is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from bench.registered import made, model_and_sources, workspace_at
from flows.registry.evidence import broken
from tasks.adapters.attach import init_adapter, load_packaged, save_adapter
from tasks.adapters.package import FOLDER
from tasks.core.artifacts import atomic_folder, digests
from tasks.core.errors import BadData
from tasks.core.layout import LINEAGE
from tasks.models.loader import model_files
from tasks.publish.model_card import CARD
from tasks.register.lineage import lineage_of
from tasks.register.mlflow_log import log_model
from tasks.register.sbom import SBOM
from tasks.register.stage import register
from tasks.registry import names as tag
from tasks.registry.client import connect, run_of
from tasks.registry.names import ABOUT
from tasks.registry.signing import SIGNATURE, SIGNING_KEY, VERIFYING_KEY
from tasks.registry.versions import fetch_model, versions
from tasks.serving.signature import requirements
from tests.flows.test_promote import Dying
from tests.helpers.commands import environment
from tests.helpers.samples import LOREFT, SFT, method


def test_a_version_holds_all_that_belongs_to_it(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    for words in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key],
        ["ec", "-in", key, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    monkeypatch.setenv(SIGNING_KEY, str(key))
    workspace = workspace_at(tmp_path / "workspace")
    (tmp_path / "made").mkdir()
    outputs = made(tmp_path / "made", pico_base, 150)
    named = model_and_sources(workspace)
    version = register(workspace, "qlora", outputs, "content", *named)
    assert str(register(workspace, "qlora", outputs, "content", *named).version) == str(version.version) == "1"
    client = connect(workspace)
    folder = fetch_model(client, version)
    assert digests(folder) == digests(outputs.model)
    about = folder.parent / ABOUT
    assert {path.name for path in about.iterdir()} == {CARD, LINEAGE, SBOM, SIGNATURE}
    card = (about / CARD).read_text()
    assert version.description == card
    for said in ("## Figures", "| held_out | 200 | exact_match | 0.750 |", "Apache-2.0", "## Limits", "## Licence"):
        assert said in card
    assert vars(ModelCard(card).data)["library_name"] == "transformers"
    lineage = json.loads((about / LINEAGE).read_text())
    assert lineage["base"]["weights_sha256"] == version.tags[tag.BASE_WEIGHTS]
    assert lineage["templates"] == dict.fromkeys(("training", "evaluation", "model"), version.tags[tag.TEMPLATE_TAG])
    assert version.tags[tag.SIGNED] == "true"
    held = {Path(file.path).name for file in client.list_artifacts(str(version.run_id), version.tags[tag.REPORT])}
    assert held == {"metrics.json", "examples.parquet", "base.parquet", CARD, LINEAGE, SBOM, SIGNATURE}
    metrics = client.get_run(str(version.run_id)).data.metrics
    assert metrics["score.held_out"] == 0.75
    assert broken(client, version) == ""
    monkeypatch.setenv(VERIFYING_KEY, str(public))
    assert broken(client, version) == ""
    loaded = mlflow.pyfunc.load_model(f"models:/temper-tiny/{version.version}")
    assert loaded.predict({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2})
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b" ")
    with pytest.raises(BadData, match="was changed after it was written"):
        mlflow.pyfunc.load_model(f"models:/temper-tiny/{version.version}")
    logged = "".join(p.read_text(errors="ignore") for p in (workspace / ".temper").rglob("*") if p.is_file())
    assert not any(line in logged for line in key.read_text().splitlines()[1:-1])


def test_a_kill_after_any_request_loses_nothing_and_doubles_nothing(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At random moments, a hundred times, and with two at once: python -m bench.registry register"""
    workspace, kills = workspace_at(tmp_path / "workspace"), 0
    client, named = connect(workspace), model_and_sources(workspace)
    (tmp_path / "made").mkdir()
    outputs = made(tmp_path / "made", pico_base, 150)
    lineage = lineage_of(workspace, "qlora", outputs, "content", *named)
    monkeypatch.setattr("tasks.register.stage.lineage_of", lambda *_: lineage)  # it takes long, and asks MLflow nothing
    while True:
        with monkeypatch.context() as patch:
            patch.setattr("tasks.register.stage.connect", Dying(client, kills + 1).of)
            try:
                version = register(workspace, "qlora", outputs, "content", *named)
            except KeyboardInterrupt:
                kills += 1
                found = versions(client, "temper-tiny") if kills > 1 else []
                assert len(found) <= 1
            else:
                break
    assert kills > 1
    assert [each.version for each in versions(client, "temper-tiny")] == [version.version]
    assert broken(client, version) == ""
    history = client.get_metric_history(str(version.run_id), "score.held_out")
    assert [metric.value for metric in history] == [0.75]


KINDS = ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")
PROMPT = list(range(5, 25))

CLEAN = """
import re, sys
from importlib import metadata

def plain(line):
    return re.split("[ ;<>=!~\\[(]", line)[0].lower().replace("_", "-")

def needed(names):
    seen, todo = set(), [plain(name) for name in names]
    while todo:
        if (name := todo.pop()) in seen:
            continue
        seen.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        todo += [plain(line) for line in lines if "extra ==" not in line]
    return seen

class Clean:
    def __init__(self, requirements):
        allowed = needed(requirements)
        self.refused = {
            module
            for module, packages in metadata.packages_distributions().items()
            if not any(package.lower().replace("_", "-") in allowed for package in packages)
        } - {"tasks", "flows"}

    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        ours = "/tasks/" in frame.f_code.co_filename  # other packages ask which of their helpers there are
        if ours and name.partition(".")[0] in self.refused:
            raise ModuleNotFoundError(f"{name} is not among the requirements", name=name)
"""
"""What refuses our own code all packages but those that a registered model asks for, and what these ask for."""

ELSEWHERE = (
    CLEAN
    + """
requirements, store, dtype, prompt, out, *uris = sys.argv[1:]
sys.meta_path.insert(0, Clean(requirements.split()))

import os

import mlflow
import torch
from safetensors.torch import save_file

mlflow.set_tracking_uri(store)
os.environ["TEMPER_COMPUTE_DTYPE"] = dtype
found = {}
for number, uri in enumerate(uris):
    model = mlflow.pyfunc.load_model(uri).unwrap_python_model().model
    with torch.no_grad():
        found[str(number)] = model(input_ids=torch.tensor([list(map(int, prompt.split()))])).logits
save_file(found, out)

import tasks
assert "/code/tasks/" in tasks.__file__, tasks.__file__  # the version brought it along
"""
)


@pytest.mark.parametrize(("dtype", "kinds"), [("bfloat16", KINDS), ("float32", KINDS[:1])])
def test_every_intervention_is_the_same_to_the_bit_where_its_version_is_loaded(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, kinds: Sequence[str]
) -> None:
    monkeypatch.setenv("TEMPER_COMPUTE_DTYPE", dtype)
    client = connect(tmp_path)
    uris, expected = [], []
    for kind in kinds:
        model: Any = init_adapter(pico_base, method({**LOREFT, "name": kind, "positions": "f2+l3"}, SFT).adapter)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
            expected.append(model.eval()(input_ids=torch.tensor([PROMPT])).logits)
        with atomic_folder(tmp_path / kind) as folder:
            for file in model_files(pico_base):
                shutil.copyfile(file, folder / file.name)
            (folder / FOLDER).mkdir()
            save_adapter(model, folder / FOLDER)
        run = run_of(client, tmp_path, kind, kind, {})
        uris.append(log_model(client, run, tmp_path / kind, None, kind)[1])
    store = client.tracking_uri
    out = tmp_path / "elsewhere" / "logits.safetensors"
    out.parent.mkdir()
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            ELSEWHERE,
            " ".join(requirements(signed=False)),
            store,
            dtype,
            " ".join(map(str, PROMPT)),
            out,
            *uris,
        ],
        cwd=out.parent,
        env=environment(PYTHONPATH=""),
        check=True,
    )
    found = load_file(out)
    base = load_packaged(pico_base)
    with torch.no_grad():
        untouched = base(input_ids=torch.tensor([PROMPT])).logits
    for number, logits in enumerate(expected):
        assert torch.equal(found[str(number)], logits), kinds[number]
        assert not torch.equal(logits, untouched)
