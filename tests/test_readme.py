"""Every command in the README and the pages of docs/ is run, in their order, on a copy of a finished workspace."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.run.edit_params import change_params
from tasks.orchestration.params import check
from tests.conftest import ROOT, temper

TASKS = ("data", "base", "methods", "merging", "evaluation", "promotion", "serving", "ui", "servers", "distributed")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in TASKS)]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]

ELSEWHERE = {
    "temper init --from chats.jsonl": "tests/flows/run/test_init_params.py",
    "make run": "it is what a session's workspace is made by, as `temper run`",
    "make test": "it runs this test",
    'temper schedule --cron "0 3 * * *"': "tests/flows/run/test_schedule.py",
    "dvc repro": "tests/flows/test_retrain.py",
    "temper push models:/temper-tiny@reft owner/name": "tests/flows/chat/test_adapters.py",
    "temper estimate": "tests/flows/files/test_estimate.py",
    "mlflow models serve -m models:/temper-tiny@champion --env-manager local -h 127.0.0.1 -p 5001": "test_chat_model",
    "curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' "
    '-d \'{"messages": [{"role": "user", "content": "Hello"}]}\'': "tests/tasks/serving/test_chat_model.py",
    "temper serve": "tests/flows/serve/test_server.py, of a folder; test_versions.py, of the champion",
    "temper serve --new-key alice": "tests/flows/serve/test_server.py",
    "temper serve --record .temper/said.db": "tests/flows/serve/test_server.py",
    "TEMPER_RECORD=postgresql://temper:PASSWORD@db.example/said temper serve": "tests/flows/serve/test_server.py",
    "temper run --feedback": "tests/flows/run/test_feedback_runs.py",
    "temper feedback": "tests/flows/run/test_feedback_runs.py",
    "temper schedule --on-feedback 100": "tests/flows/run/test_feedback_runs.py",
    "temper feedback said.db rows --consent training=yes": "tests/flows/serve/test_feedback.py",
    "temper drift --record .temper/said.db": "tests/flows/serve/test_drift.py",
    "temper serve --engine vllm": "tests/flows/serve/engines, by a program that speaks as vLLM does",
    "temper serve models/tiny --engine llama.cpp --slots 4 --engine-dtype q8_0": "tests/flows/serve/engines",
    "temper ui": "tests/flows/ui/test_command.py",
    "temper ui models:/temper-tiny@champion models:/temper-tiny/2 --keys keys": "tests/flows/ui/test_command.py",
    "temper ui --new-key alice --role approver": "tests/flows/ui/test_command.py",
    "temper feedback .temper/record.db feedback": "tests/flows/ui/test_actions.py",
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
    '-d \'{"model": "temper-tiny", "messages": [{"role": "user", "content": "Hello"}]}\'': "serve/test_app.py",
    "TEMPER_LAUNCH=infra/launch/fsdp2.yaml temper run": "tests/tasks/train/test_launcher.py",
    "temper run --recipe recipes/belle.yaml --set ingest.sources.belle.path=belle_chat_1k.json": "test_recipes.py",
}
SAID = {
    "temper run": r"nothing has changed since the last run",
    "temper run --set train.orpo.objective.weight=0.2": r"\n\+ +weight: 0\.2\n",
    "temper status": r"champion: +version \d \((qlora|orpo|reft)\)",
    "temper merge data/base data/adapters/qlora merged": r"merged: \d+\.\d MB, merged onto the dequantized weights",
    "temper export data/models/qlora gguf --dtype q8_0": r"gguf: GGUF in q8_0",
    "temper page": r"comparison\.html$",
    'temper chat "What is 12 plus 7?"': r"\n$",
    'temper promote --reason "new data" --version 2': r"\(qlora\) is now champion: models:/temper-tiny@champion",
    "temper compare 1 2": r"held_out +loss +\d+ +\d",
    "temper rollback": r"\(orpo\) is now champion",
    "temper history": r"promote +\d +\d +new data +6 of 6 checks passed",
    "temper lineage models:/temper-tiny@champion": r"git commit: +[0-9a-f]{40}",
    "temper vote 1 2": r"votes: version 1 0, version 2 0",
    "temper quarantine": r"^no row is in quarantine$",
    "temper score models:/temper-tiny@champion in.parquet out.parquet": r"1 rows written to ",
    "temper doctor": r"ok +MLflow +answers: sqlite:",
    "temper evaluate models/tiny --suite exam.csv": r"exam +accuracy_per_character +2 +[01]\.\d+ \[",
    "temper inspect chats.jsonl": r"chats\.jsonl: conversations, 1 rows \(1 chat\)",
    "temper render chats.jsonl --tokenizer models/tiny": r"assistant\n\[\[19<\|im_end\|>\]\]",
    "temper convert chats.jsonl out.json --to alpaca": r"1 rows written to out\.json",
}


def test_every_command_is_tried_somewhere() -> None:
    assert {*SAID, *ELSEWHERE} == set(COMMANDS)


@pytest.fixture(scope="module")
def used(factory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy, on which the commands follow each other; its gate is open, as a pico model's figures are chance."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = tmp_path_factory.mktemp("readme") / "a copy"
    shutil.copytree(factory, target, symlinks=True)
    change_params(target, None, ["promote.margin=100", "promote.confidence=0.05"])
    chat = [{"role": "user", "content": "What is 12 plus 7?"}, {"role": "assistant", "content": "19"}]
    pq.write_table(pa.table({"prompt": ["Hello"]}), target / "in.parquet")
    (target / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    (target / "exam.csv").write_text("question,A,B,answer\nWhat is 1 plus 2?,3,4,A\nWhat is 2 plus 2?,3,4,B\n")
    return target


def versions(workspace: Path) -> dict[str, str]:
    """The version of every method; their order is that in which the trainings ended."""
    told = json.loads(temper(workspace, "status", "--json").stdout)
    return {name: method["version"] for name, method in told["methods"].items()}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command in SAID])
def test_a_command_does_what_it_says(used: Path, command: str) -> None:
    words = shlex.split(command)[1:]
    if "--version" in words:
        words[-1] = versions(used)["qlora"]
        temper(used, "promote", "--version", versions(used)["orpo"])
    said = temper(used, *words).stdout
    assert re.search(SAID[command], said), said
    if "orpo" in command:
        ran = re.findall(r"^([a-z]+@?[a-z]*) +completed +\d", said, re.MULTILINE)
        assert sorted(ran) == ["evaluate@orpo", "merge@orpo", "register@orpo", "train@orpo"]


SNIPPETS = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_what_the_readme_puts_into_params_is_valid(snippet: str) -> None:
    quickstart = dict(YAML(typ="safe").load(ROOT / "recipes" / "quickstart.yaml"))
    given = YAML(typ="safe").load(snippet)
    for section in {"evaluate", "merge"} & given.keys():  # of which the README shows suites and exports alone
        given[section] = {**quickstart[section], **given[section]}
    check({**quickstart, **given}, "README.md")


@pytest.mark.parametrize("command", ["make run", "make test"])
def test_make_knows_its_targets(command: str) -> None:
    subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_readme_is_short_and_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 130
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in readme, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link
