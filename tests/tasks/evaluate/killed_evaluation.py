"""One short evaluation as a process of its own, for tests/tasks/evaluate/test_kills.py to kill.

Whatever an evaluation imports late is imported here at once: processes are forked from one that has it all.
"""

from __future__ import annotations

from pathlib import Path

import datasets  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from tasks.core.artifacts import as_json, atomic_write
from tasks.core.layout import EXAMPLES
from tasks.core.stage import quiet_libraries
from tasks.evaluate.model_under_test import ModelUnderTest
from tasks.evaluate.suites import run_suites
from tasks.reports.items import suite_metrics, write_items
from tests.helpers.samples import CHOICE, EVALUATE, MULTIPLE, rows_suite

WRITTEN = {"name": "generate", "extract": "whole", "target": "whole", "match": "rougeL", "stop": []}
PARAMS = EVALUATE.model_copy(update={"batch_size": 2})


def evaluation(base: str, rows: str, folder: str) -> None:
    """Evaluates and writes the report into `folder`/report; its journal is beside it."""
    quiet_libraries()
    torch.set_num_threads(1)
    place = Path(folder)
    examinee = ModelUnderTest(Path(base), PARAMS, place / "journals", chats=True)
    written = rows_suite(rows, WRITTEN, {"question": "question", "answer": "target"}, max_new_tokens=12)
    found = run_suites(examinee, {"chosen": rows_suite(rows, CHOICE, MULTIPLE), "written": written})
    (place / "report").mkdir(exist_ok=True)
    write_items(place / "report" / EXAMPLES, found.items)
    atomic_write(
        place / "report" / "metrics.json", as_json(suite_metrics(found.items, found.summaries, PARAMS.resampling))
    )
