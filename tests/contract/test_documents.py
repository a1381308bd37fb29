"""The four documents agree: dvc.yaml, prefect_tasks.py, params.yaml and the README say the same of every stage."""

from __future__ import annotations

import ast
import compileall
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from pydantic import BaseModel
from ruamel.yaml import YAML

from flows.run.show_params import schema_text
from tasks.core import pipeline
from tasks.core.errors import BadParams
from tasks.orchestration.params import Params, load_params
from tests.conftest import ROOT, dvc, git, run_all_stages

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PIPELINE = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
STAGES = list(PIPELINE)


def body(stage: str) -> dict[str, Any]:
    found: dict[str, Any] = PIPELINE[stage].get("do", PIPELINE[stage])
    return found


def module_file(name: str) -> Path | None:
    """The file of a first-party module or package; None for anything else."""
    path = ROOT / name.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None) if name.startswith(("tasks", "flows")) else None


def imported(module: str) -> set[str]:
    """Every first-party module that a module imports, however late and however indirectly, and itself."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        file = module_file(name)
        if file is None or name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
    return seen


def module_of(stage: str) -> str:
    return "tasks.evaluate.baseline" if stage == "baseline" else f"tasks.{stage}.stage"


def test_stages_are_modules_wrappers_and_rows_of_the_readme() -> None:
    from tasks.orchestration import prefect_tasks

    assert set(STAGES) == set(prefect_tasks.POLICIES)
    for stage in STAGES:
        command = module_of(stage).removesuffix(".stage")  # a folder runs its __main__.py, which calls the stage's main
        assert f"python -m {command} " in body(stage)["cmd"]
        assert (
            stage == "baseline"
            or f"from {module_of(stage)} import main" in (ROOT / "tasks" / stage / "__main__.py").read_text()
        )
        assert getattr(prefect_tasks, stage).name == stage
        assert (stage in prefect_tasks.PER_ITEM) == ("foreach" in PIPELINE[stage])
    section = (ROOT / "README.md").read_text().partition("## Stages")[2].partition("\n## ")[0]
    table = re.findall(r"^\| `([a-z]+)(?:@[A-Z]+)?` \|", section, re.MULTILINE)
    assert table == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_folders_of_all_the_code_that_it_imports(stage: str) -> None:
    """No more, or a change of what it does not use would run it again; no less, or a change would not."""
    code = [dep for dep in body(stage)["deps"] if re.fullmatch(r"tasks/\w+", dep)]
    rooms = {name.split(".")[1] for name in imported(module_of(stage)) if "." in name}
    assert code == sorted(f"tasks/{room}" for room in rooms)
    assert not [dep for dep in body(stage)["deps"] if dep.endswith(".py")]


def test_folders_of_code_take_few_lines() -> None:
    assert sum(dep.startswith("tasks/") for stage in STAGES for dep in body(stage)["deps"]) <= 70


def test_every_room_has_its_layer() -> None:
    """A folder that no contract names would be free to import anything."""
    (layers,) = (
        contract["layers"]
        for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    rooms = {f"tasks.{room.name}" for room in (ROOT / "tasks").iterdir() if (room / "__init__.py").is_file()}
    assert len(layers) <= 10
    assert {name.strip() for layer in layers for name in layer.split("|")} == {"flows", *rooms}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "bench"}
    assert packages == {"flows", "tasks", "temper"}  # the API stands above all layers, by a contract of its own


@pytest.mark.parametrize("stage", STAGES)
def test_the_docstring_of_a_stage_is_its_contract(stage: str) -> None:
    text = ast.get_docstring(ast.parse(str((module_file(module_of(stage)) or ROOT).read_text()))) or ""
    found = re.findall(r"^(Reads|Writes|Params|Fails): ", text, re.MULTILINE)
    assert found == ["Reads", "Writes", "Params", "Fails"]
    for key in body(stage).get("params", []):
        assert re.sub(r"\$\{key\}", "", key).rstrip(".").split(".")[0] in text.replace("validate_", "validate")


def keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_every_section_of_params_belongs_to_a_stage_or_to_promotion() -> None:
    assert keys(Params) - {"promote", "train_defaults"} <= set(STAGES)
    assert set(STAGES) - keys(Params) == {"baseline"}  # it is `evaluate` of the base, with the same params


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_complete_and_every_param_that_dvc_names_is_there(path: Path) -> None:
    load_params(path)
    content = YAML(typ="safe").load(path)
    for stage in STAGES:
        each = PIPELINE[stage].get("foreach", "").strip("${}")
        items = [None] if not each else list(_lookup(content, each))
        for item in items:
            for key in body(stage).get("params", []):
                _lookup(content, key.replace("${key}", item or ""))


def _lookup(content: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        content = content[part]
    return content


MUST_BE_SAID = {
    "kind", "name", "path", "url", "sha256", "id", "revision",  # what a thing is, and where it lies
    "first", "shuffled",  # alternatives of `take`
    "weights", "heads", "kv_heads", "context_tokens", "stop_token",  # facts of a checkpoint
    "tokens", "of",  # how long a pretraining takes, and what is continued
    "sources", "ingest", "base", "train",
    "method",  # of PEFT
    "type",  # of Great Expectations
    "task", "tasks", "columns", "prompt", "metric", "data", "revisions", "regex", "about", "source", "parts",
}  # fmt: skip
"""What nobody can guess; some of these have a default where they mean something else."""


def test_every_param_has_a_default_but_those_that_nobody_can_guess() -> None:
    def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield model
        for other in model.__subclasses__():
            yield from sections(other)

    from tasks.core.params import Section

    required = {
        name
        for section in sections(Section)
        if section.__module__.startswith("tasks.")
        for name, field in section.model_fields.items()
        if field.is_required()
    }
    assert required == MUST_BE_SAID


def test_every_knob_is_explained_beside_its_declaration() -> None:
    from tasks.core.params import Section

    def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
        for other in model.__subclasses__():
            yield from (other, *sections(other))

    plain = {"kind", "name", "sources", "adapter", "objective", "of", "growth"}
    for section in sections(Section):
        if section is not Params:
            for name, field in section.model_fields.items():
                assert field.description or name in plain, (section, name)


def test_the_reference_pages_say_what_the_code_does() -> None:
    checked = subprocess.run(
        [sys.executable, "infra/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_every_row_of_a_table_of_the_params_page_is_one_whole_line() -> None:
    lines = (ROOT / "docs" / "params.md").read_text().splitlines()
    tables = [number for number, line in enumerate(lines) if line == "|---|---|---|---|"]
    for number in tables:
        rows = lines[number + 1 :]
        rows = rows[: rows.index("")] if "" in rows else rows
        for row in rows:
            assert re.fullmatch(r"\| `\w+` \| .+ \| .+ \| .*\|", row), row


def test_the_quickstart_is_what_a_clone_begins_with() -> None:
    quickstart = (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert (ROOT / "params.yaml").read_text() == quickstart.replace("$schema=../", "$schema=", 1)


def test_the_shipped_schema_is_that_of_the_code_and_every_params_file_names_it() -> None:
    assert (ROOT / "params.schema.json").read_text() == schema_text()
    for path in (ROOT / "params.yaml", *RECIPES):
        first = path.read_text().partition("\n")[0]
        named = first.removeprefix("# yaml-language-server: $schema=")
        assert (path.parent / named).resolve() == ROOT / "params.schema.json"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_valid_by_the_shipped_schema(path: Path) -> None:
    """As an editor checks it: by a JSON schema library, not by pydantic."""
    schema = json.loads((ROOT / "params.schema.json").read_text())
    assert [error.message for error in Draft202012Validator(schema).iter_errors(YAML(typ="safe").load(path))] == []
    wrong = YAML(typ="safe").load(path) | {"evaluates": {}}
    assert not Draft202012Validator(schema).is_valid(wrong)


def test_our_reading_of_the_graph_is_dvcs(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage by stage: commands, dependencies, params and outputs."""
    from dvc.repo import Repo

    monkeypatch.chdir(clone)
    with Repo() as repo:
        theirs = {
            stage.addressing: (
                stage.cmd,
                sorted(dep.def_path for dep in stage.deps if dep.def_path != "params.yaml"),
                sorted(param for dep in stage.deps if dep.def_path == "params.yaml" for param in dep.params),
                sorted(out.def_path for out in stage.outs),
            )
            for stage in repo.index.stages
        }
    ours = {
        name: (node.command, sorted(node.deps), sorted(node.params), sorted(node.outs))
        for name, node in pipeline.load(clone).items()
    }
    assert ours == theirs


def test_our_hashes_are_dvcs(clone: Path, tmp_path: Path) -> None:
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem

    (tmp_path / "d" / "deep er").mkdir(parents=True)
    for name in ("b", "a", "deep er/é", "deep er/A"):
        (tmp_path / "d" / name).write_text(name)
    fs = LocalFileSystem()  # type: ignore[no-untyped-call]
    store = HashFileDB(fs, str(tmp_path / "cache"))
    for path in (tmp_path / "d", tmp_path / "d" / "a", clone / "tasks"):
        _, _, built = build(store, str(path), fs, "md5")
        assert pipeline.dvc_hash(path) == built.hash_info.value


def test_what_python_writes_beside_code_is_no_change_of_it_to_dvc_or_to_us(clone: Path, tmp_path: Path) -> None:
    from dvc.repo import Repo
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db import HashFileDB
    from dvc_objects.fs.local import LocalFileSystem

    workspace = tmp_path / "a clone"
    shutil.copytree(clone, workspace)
    room = workspace / "tasks" / "core"
    before = pipeline.dvc_hash(room)
    compileall.compile_dir(room, quiet=1)
    (room / "stray.pyc").write_bytes(b"x")
    assert list(room.glob("__pycache__/*.pyc"))
    fs = LocalFileSystem()  # type: ignore[no-untyped-call]
    with Repo(workspace) as repo:
        _, _, built = build(HashFileDB(fs, str(tmp_path / "cache")), str(room), fs, "md5", ignore=repo.dvcignore)
    assert pipeline.dvc_hash(room) == built.hash_info.value == before
    (room / "errors.py").write_text("# another")
    assert pipeline.dvc_hash(room) != before


def test_outputs_are_not_in_git(clone: Path) -> None:
    """Else DVC would write .gitignore files next to them, which stages would then read as data."""
    for node in pipeline.load(clone).values():
        for out in node.outs:
            assert git(clone, "check-ignore", "--no-index", out).strip() == out


def test_nothing_shipped_names_a_package_host_or_a_path_of_this_machine() -> None:
    hosts = "|".join(("index-" + "url", "find-" + "links", "trusted-" + "host", "file:" + "///"))
    for name in git(ROOT, "ls-files").splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".lock", ".toml", ".txt", ""):
            text = re.sub(r"--no-emit-[a-z-]+", "", path.read_text(errors="replace"))
            assert not re.search(hosts, text), name
            assert not re.search(r"/(?:work|home|root)/" + "[a-z]", text), name


NINE_LINES = """\
ingest: {sources: {mine: {kind: file, path: my.jsonl}}}
validate: {}
base: {kind: local, path: models/tiny}
render: {held_out: 0.1}
train_defaults: {}
train: {mine: {}}
merge: {}
evaluate: {max_new_tokens: 4}
register: {model: mine}
"""


def test_nine_lines_on_rows_of_ones_own_are_a_params_file_for_dvc(workspace: Path) -> None:
    """DVC finds all that its stages name; the base knows nothing, and a rank of 16 moves it far enough."""
    rows = [{"instruction": f"How much is {n} and {m}?", "output": str(n + m)} for n in range(12) for m in range(10)]
    (workspace / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workspace / "params.yaml").write_text(NINE_LINES)
    run_all_stages(workspace)
    dvc(workspace, "commit", "--force")  # reads every dependency and every params key of every stage
    assert "up to date" in dvc(workspace, "status")
    assert (workspace / "data" / "reports" / "mine" / "registered.json").is_file()
    assert load_params(workspace / "params.yaml").train["mine"].adapter.name == "qlora"


def test_a_key_that_dvc_needs_is_asked_for_by_name(workspace: Path) -> None:
    (workspace / "params.yaml").write_text(NINE_LINES.replace("merge: {}\n", "").replace("{held_out: 0.1}", "{}"))
    with pytest.raises(BadParams) as caught:
        pipeline.load(workspace)
    assert caught.value.examples == ("render.held_out", "merge")


def test_the_way_of_a_row_names_what_there_is() -> None:
    for _, file, name, _ in runpy.run_path(str(ROOT / "infra" / "make_docs.py"))["ROW"]:
        names = set()
        for node in ast.parse((ROOT / file).read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names |= {getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))}
        assert name in names, (file, name)


def test_the_page_of_params_has_a_table_for_every_section() -> None:
    schema = json.loads((ROOT / "params.schema.json").read_text())
    page = (ROOT / "docs" / "params.md").read_text()
    for name, section in schema["$defs"].items():
        for key, field in section.get("properties", {}).items():
            inner = field.get("items", field)
            if "description" in field and not {"$ref", "oneOf", "patternProperties"} & inner.keys():
                assert f"| `{key}` |" in page, (name, key)
                assert " ".join(field["description"].split()) in page, (name, key)
