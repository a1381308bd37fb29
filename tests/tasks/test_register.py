"""A registered model is the one that was trained, wherever it is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.adapted import FOLDER, fresh, load_packaged, publish
from tasks.models import model_files
from tasks.outputs import whole_folder
from tasks.register import log_model
from tasks.tracking import connect, run_of
from tests.conftest import environment
from tests.samples import LOREFT, SFT, method

KINDS = ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")
PROMPT = list(range(5, 25))

ELSEWHERE = """
import sys
import mlflow
import torch
from safetensors.torch import save_file
from tasks import models

store, dtype, prompt, out, *uris = sys.argv[1:]
mlflow.set_tracking_uri(store)
models.compute_dtype = lambda: getattr(torch, dtype)
found = {}
for number, uri in enumerate(uris):
    model = mlflow.pyfunc.load_model(uri).unwrap_python_model().model
    with torch.no_grad():
        found[str(number)] = model(input_ids=torch.tensor([list(map(int, prompt.split()))])).logits
save_file(found, out)
"""


@pytest.mark.parametrize(("dtype", "kinds"), [("bfloat16", KINDS), ("float32", KINDS[:1])])
def test_every_intervention_is_the_same_to_the_bit_where_its_version_is_loaded(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, kinds: Sequence[str]
) -> None:
    monkeypatch.setattr("tasks.models.compute_dtype", lambda: getattr(torch, dtype))
    client = connect(tmp_path)
    uris, expected = [], []
    for kind in kinds:
        model: Any = fresh(pico_base, method({**LOREFT, "name": kind, "positions": "f2+l3"}, SFT).adapter)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
            expected.append(model.eval()(input_ids=torch.tensor([PROMPT])).logits)
        with whole_folder(tmp_path / kind) as folder:
            for file in model_files(pico_base):
                shutil.copyfile(file, folder / file.name)
            (folder / FOLDER).mkdir()
            publish(model, folder / FOLDER)
        run = run_of(client, tmp_path, kind, kind, {})
        uris.append(log_model(client, run, tmp_path / kind, None, kind)[1])
    store = client.tracking_uri
    out = tmp_path / "elsewhere" / "logits.safetensors"
    out.parent.mkdir()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE, store, dtype, " ".join(map(str, PROMPT)), out, *uris],
        cwd=out.parent,
        env=environment(),
        check=True,
    )
    found = load_file(out)
    base = load_packaged(pico_base)
    with torch.no_grad():
        untouched = base(input_ids=torch.tensor([PROMPT])).logits
    for number, logits in enumerate(expected):
        assert torch.equal(found[str(number)], logits), kinds[number]
        assert not torch.equal(logits, untouched)
