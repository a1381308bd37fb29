"""The shipped notebooks, and the blocks of docs/python.md, run as they stand, on a pico model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.helpers.commands import environment
from tests.helpers.samples import write_lines

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SHIPPED = '"../../models/tiny"'


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return found


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(path: Path, pico_base: Path, tmp_path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    assert code.count(SHIPPED) == 1
    assert (path.parent / json.loads(SHIPPED) / "config.json").is_file()
    said = run(code.replace(SHIPPED, repr(str(pico_base))).replace("max_mean_kl=0.1", "max_mean_kl=0.5"), tmp_path)
    losses = re.findall(r"held-out loss, before and after: \(([\d.]+), ([\d.]+)\)", said)
    assert losses
    assert all(float(after) < float(before) for before, after in losses)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stores_no_outputs_and_explains_its_cells(path: Path) -> None:
    for before, cell in zip([{"cell_type": ""}, *cells(path)], cells(path), strict=False):
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert cell["cell_type"] != "code" or before["cell_type"] == "markdown"


def test_the_blocks_of_the_page_run_in_their_order(pico_base: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(pico_base)
    sums = [(a, b) for a in range(2, 10) for b in range(2, 10)]
    write_lines(tmp_path / "chats.jsonl", [{"prompt": f"What is {a} plus {b}?", "reply": str(a + b)} for a, b in sums])
    (tmp_path / "exam.csv").write_text("question,A,B,answer\nWhat is 1 plus 2?,3,4,A\nWhat is 2 plus 2?,3,4,B\n")
    said = run("\n".join(blocks), tmp_path)
    assert "no such folder" in said
    for written in ("adapter", "ia3", "reft", "merged", "gguf"):
        assert (tmp_path / written / "manifest.json").is_file()
