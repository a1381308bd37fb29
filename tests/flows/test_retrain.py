"""The whole factory through the real command line, DVC, Prefect and MLflow, on a pico model."""

from __future__ import annotations

import json
import re
import sqlite3
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from flows.comparison.page import COMPARISON_PAGE as COMPARISON
from flows.run.edit_params import change_params
from tasks.core import pipeline
from tasks.inference.params import Generation
from tests.conftest import FIRST_RUN, digests, dvc, git, pico_workspace, run_all_stages, temper

METHODS = ("qlora", "orpo", "reft")


def output(workspace: Path) -> str:
    return (workspace / FIRST_RUN).read_text()


# --- one run --------------------------------------------------------------------------------------------------------


def test_the_run_ends_with_figures_a_champion_a_reply_times_and_where_to_look(factory: Path) -> None:
    said = output(factory)
    for name in ("base", *METHODS):
        assert re.search(rf"^{name} +[01]\.\d{{3}} \[", said, re.MULTILINE), name
    assert re.search(
        r"models:/temper-tiny/[123] \((qlora|orpo|reft)\) is now champion: models:/temper-tiny@champion", said
    )
    assert re.search(r"^  user: .+\n(.+\n)*?  assistant:", said, re.MULTILINE)
    for stage in pipeline.load(factory):
        assert re.search(rf"^{re.escape(stage)} +completed +\d+\.\d", said, re.MULTILINE), stage
    assert re.search(rf"^comparison: +{re.escape(str(factory / COMPARISON))}$", said, re.MULTILINE)
    # quoted where the environment lies in a folder with a space
    assert re.search("mlflow'? ui --backend-store-uri", said)
    assert re.search("prefect'? server start", said)
    assert re.search("^to commit: +dvc.lock, .*: git commit params.yaml dvc.lock$", said, re.MULTILINE)


def test_a_stages_output_is_in_prefects_task_log_line_by_line(factory: Path) -> None:
    with sqlite3.connect(factory / ".temper" / "prefect" / "prefect.db") as database:
        rows = database.execute(
            "select task_run.name, log.message from log join task_run on task_run.id = log.task_run_id"
        ).fetchall()
    logs: dict[str, list[str]] = {}
    for task, message in rows:
        logs.setdefault(task, []).append(message)
    assert set(pipeline.load(factory)) <= set(logs)
    assert any(re.fullmatch(r"train qlora: .*\d+/\d+ steps.*", line) for line in logs["train@qlora"])
    keys = pipeline.recorded_keys(factory)
    for stage, lines in logs.items():
        assert f"content key {keys[stage]}" in lines


def test_the_artifact_links_every_method_to_its_mlflow_run(factory: Path) -> None:
    with sqlite3.connect(factory / ".temper" / "prefect" / "prefect.db") as database:
        ((data,),) = database.execute("select data from artifact where key = 'methods'").fetchall()
    for method in METHODS:
        run = json.loads((factory / "data" / "reports" / method / "registered.json").read_text())["run"]
        assert re.search(rf"\| {method} \|.*/runs/{run}\)", json.loads(data))


def test_the_comparison_is_linked_from_prefect_and_kept_in_mlflow(factory: Path, tmp_path: Path) -> None:
    from tasks.registry.client import connect

    with sqlite3.connect(factory / ".temper" / "prefect" / "prefect.db") as database:
        ((data,),) = database.execute("select data from artifact where key = 'comparison'").fetchall()
    run = re.search(r"/runs/(\w+)/artifacts", data)
    assert run is not None
    logged = Path(connect(factory).download_artifacts(run[1], COMPARISON.name, str(tmp_path)))
    page = logged.read_text()
    assert page == (factory / COMPARISON).read_text()
    trainings = page.partition("Trainings")[2].partition("</table>")[0]
    for method in METHODS:  # each was trained, whatever else is known of it
        assert method in trainings


def test_one_identity_from_the_registry_to_the_rows(factory: Path) -> None:
    """The content key that DVC's lock gives the training is on the MLflow run and on the version."""
    from tasks.registry.client import connect
    from tasks.registry.versions import versions

    client = connect(factory)
    keys = pipeline.recorded_keys(factory)
    found = {version.tags["temper.method"]: version for version in versions(client, "temper-tiny")}
    template = json.loads((factory / "data" / "rendered" / "manifest.json").read_text())["template_sha256"]
    assert set(found) == set(METHODS)
    for method, version in found.items():
        run = client.get_run(str(version.run_id))
        assert run.data.tags["temper.key"] == keys[f"train@{method}"]
        assert found[method].tags["temper.template_sha256"] == template  # served as it was trained
        steps = [json.loads(line) for line in (factory / f"data/adapters/{method}/log.jsonl").read_text().splitlines()]
        logged = client.get_metric_history(run.info.run_id, "loss")
        assert [(m.step, m.value) for m in logged] == [(s["step"], s["loss"]) for s in steps]
    assert [json.loads((factory / f"data/reports/{m}/registered.json").read_text())["version"] for m in METHODS] == [
        str(found[m].version) for m in METHODS
    ]


def test_a_version_has_its_signature_example_and_aliases(factory: Path) -> None:
    import mlflow

    from tasks.registry.client import connect

    client = connect(factory)
    aliases = client.get_registered_model("temper-tiny").aliases
    assert set(aliases) == {"champion", "challenger", *METHODS}
    about = mlflow.models.get_model_info("models:/temper-tiny@champion")
    assert about.signature is not None
    assert about.signature.inputs.input_names() == ["messages", "max_tokens", *Generation.model_fields]
    assert about.signature.outputs.input_names() == ["object", "model", "choices", "usage"]
    assert about.saved_input_example_info is not None


def test_one_training_runs_at_a_time(factory: Path) -> None:
    from tasks.registry.client import connect
    from tasks.registry.versions import versions

    client = connect(factory)
    entries = [json.loads(line) for line in (factory / ".temper" / "journal.jsonl").read_text().splitlines()]
    ends = {e["stage"]: datetime.fromisoformat(e["at"]).timestamp() for e in entries if e["state"] == "completed"}
    starts = [
        (client.get_run(str(v.run_id)).info.start_time / 1000, ends[f"train@{v.tags['temper.method']}"])
        for v in versions(client, "temper-tiny")
    ]
    order = sorted(starts)
    assert len(order) == len(METHODS)
    assert all(end <= start + 1 for (_, end), (start, _) in pairwise(order))  # `at` has whole seconds


def test_status_tells_programs_what_there_is(factory: Path) -> None:
    told = json.loads(temper(factory / "data", "status", "--json").stdout)  # from a folder below, as git does
    assert told["model"] == "temper-tiny"
    assert told["champion"]["method"] in METHODS
    metrics = {
        name: json.loads((factory / f"data/reports/{name}/metrics.json").read_text()) for name in ("base", *METHODS)
    }
    assert told["base"]["exact_match"] == metrics["base"]["exact_match"]["mean"]
    for method in METHODS:
        assert told["methods"][method]["loss"] == metrics[method]["loss"]
        assert told["methods"][method]["exact_match"] == metrics[method]["exact_match"]["mean"]
    assert set(told["stages"]) == set(pipeline.load(factory))
    assert {stage["state"] for stage in told["stages"].values()} == {"current"}
    assert all(stage["seconds"] > 0 for stage in told["stages"].values())


def test_no_process_of_a_run_asks_the_network_for_anything(factory: Path) -> None:
    heard = [line.split("\t") for line in (factory.parent / "connections.txt").read_text().splitlines()]
    watched = [command for asked, command in heard if asked == "started"]
    for process in (
        "flows.cli run",
        "flows.run.server_process",
        *(node.command for node in pipeline.load(factory).values()),
    ):
        assert any(process[:60].removeprefix("python ") in command for command in watched), process
    asked = {asked for asked, _ in heard} - {"started"}
    assert asked <= {"127.0.0.1", "localhost", "::1", "None"}


# --- run again --------------------------------------------------------------------------------------------------------


def test_again_with_nothing_changed_nothing_runs(copy: Path) -> None:
    before = digests(copy, "data", "models")
    git(copy, "add", "--all")
    git(copy, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "what dvc.lock notes")
    said = temper(copy, "run").stdout
    assert "to commit" not in said
    assert "nothing has changed since the last run" in said
    assert "completed" not in said
    assert digests(copy, "data", "models") == before
    recorded = flow_runs(copy)
    assert temper(copy, "run").stdout == said  # the second time without a server, which has nothing to record
    assert flow_runs(copy) == recorded
    (copy / ".temper" / "last-run.json").write_text("{")  # cut by a kill
    (copy / COMPARISON).unlink()
    assert temper(copy, "run").stdout == said
    assert flow_runs(copy) == recorded + 1
    assert (copy / COMPARISON).is_file()
    assert dvc(copy, "status").strip() == "Data and pipelines are up to date."
    assert "Running stage" not in dvc(copy, "repro")


def flow_runs(workspace: Path) -> int:
    with sqlite3.connect(workspace / ".temper" / "prefect" / "prefect.db") as database:
        of_runs = "select count(*) from flow_run join flow on flow.id = flow_run.flow_id where flow.name = 'retrain'"
        (count,) = database.execute(of_runs).fetchone()
    return int(count)


def test_a_second_clone_gives_the_same_bytes_by_the_commands_alone(
    clone: Path, pico_base: Path, factory: Path, tmp_path: Path
) -> None:
    """In one process, without Prefect and DVC: nothing of a result hangs on what ran before it, or on who ran it."""
    second = pico_workspace(clone, pico_base, tmp_path / "second")
    run_all_stages(second)
    folders = ("data/raw", "data/clean", "data/base", "data/rendered", "data/adapters", "data/models")
    assert digests(second, *folders) == digests(factory, *folders)
    for name in ("base", *METHODS):
        for file in ("metrics.json", "examples.parquet"):
            path = f"data/reports/{name}/{file}"
            assert (second / path).read_bytes() == (factory / path).read_bytes(), path


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_rows_stop_the_run_at_once_with_one_block(workspace: Path) -> None:
    (workspace / "rows.json").write_text('[\n  {"instruction": "a", "output": "b"},\n  {"instruction": }\n]\n')
    before = (workspace / "params.yaml").read_text()
    how = "format: auto, encoding: utf-8, max_refused: 0.0, take: all, use: train, licence: mine"
    source = f"{{kind: file, path: rows.json, {how}}}"
    done = temper(workspace, "run", "--set", f"ingest.sources={{mine: {source}}}", code=65)
    assert "rows.json:3" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "Retry" not in done.stderr
    assert not (workspace / "data" / "raw").exists() or not any((workspace / "data" / "raw").iterdir())
    assert (workspace / "params.yaml.before").read_text() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--set", "train.orpo.epoch=2"], 'no key "epoch"; did you mean "epochs"?'),
        (["run", "--set", "ingest.sources.chats.path=/nowhere/rows.json"], "/nowhere/rows.json"),
        (["run", "--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["promote", "--version", "999"], "version 999 does not exist"),
        (["schedule", "--cron", "61 * * * *"], "is not a cron schedule"),
        (["schedule", "--every", "soon"], "is not an interval"),
        (["schedule"], "say one of"),
        (["chat", "hello", "--model", "models:/temper-tiny@nobody"], "cannot be loaded from the registry"),
        (["chat", "hello", "--model", "no/such/folder"], "there is no such folder"),
        (["chat", "hello", "--temperature", "-0.5"], "temperature: Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_word_is_one_readable_block_and_changes_nothing(factory: Path, words: list[str], said: str) -> None:
    before = (factory / "params.yaml").read_bytes()
    done = temper(factory, *words, code=65)
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert (factory / "params.yaml").read_bytes() == before


def test_outside_of_a_workspace_it_says_so(tmp_path: Path) -> None:
    assert "dvc.yaml" in temper(tmp_path, "status", code=65).stderr


def test_an_import_that_dvc_tracks_reruns_what_it_changes(workspace: Path, tmp_path: Path) -> None:
    """`dvc update` of a file imported with `dvc import-url` is a change of the source like any other."""
    row = '{"instruction": "a", "output": "%s"}\n'
    far = tmp_path / "far.jsonl"
    far.write_text(row % "b")
    dvc(workspace, "import-url", str(far), "near.jsonl")
    how = "format: auto, encoding: utf-8, max_refused: 0.0, take: all, use: train, licence: mine"
    source = f"{{kind: file, path: near.jsonl, {how}}}"
    change_params(workspace, None, [f"ingest.sources={{mine: {source}}}"])
    dvc(workspace, "repro", "--single-item", "ingest@mine")
    assert "didn't change" in dvc(workspace, "repro", "--single-item", "ingest@mine")
    far.write_text(row % "b" + row % "c")
    dvc(workspace, "update", "near.jsonl.dvc")
    assert "ingest mine: 2 chat" in dvc(workspace, "repro", "--single-item", "ingest@mine")
