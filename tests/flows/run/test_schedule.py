from __future__ import annotations

import json
import re
import signal
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.run.schedule import check_cron, name_of, parse_interval
from tasks.core.errors import BadParams
from tests.conftest import Beside, temper, wait_for


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("30m", timedelta(minutes=30)),
        ("6h", timedelta(hours=6)),
        ("1d", timedelta(days=1)),
        ("90m", timedelta(hours=1.5)),
    ],
)
def test_intervals(text: str, span: timedelta) -> None:
    assert parse_interval(text) == span


@pytest.mark.parametrize("text", ["", "6", "h", "0h", "-1h", "6 h", "6hh", "1w", "٣h"])
def test_what_is_no_interval(text: str) -> None:
    with pytest.raises(BadParams, match="is not an interval"):
        parse_interval(text)


@pytest.mark.parametrize("text", ["61 * * * *", "* * * *", "every day", ""])
def test_what_is_no_cron_line(text: str) -> None:
    with pytest.raises(BadParams, match="is not a cron schedule"):
        check_cron(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 3 * * * *", "6 fields; the sixth would be read as seconds"),
        ("0 3 * * * * 2030", "7 fields"),
        ("0 0 30 2 *", "names days that never come"),
        ("0 0 31 4,6,9,11 *", "names days that never come"),
        ("*/7 * * * *", "a step that does not divide the minutes"),
        ("0 */5 * * *", "such as 0,5,10,15,20"),
        ("0 0 */2 * *", "a step that does not divide the days of the month"),
        ("0 0 1 */5 *", "such as 1,6,11"),
        ("0 0 * * */2", "a step that does not divide the days of the week"),
    ],
)
def test_a_line_that_means_something_else_than_it_seems_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadParams) as caught:
        check_cron(text)
    assert said in str(caught.value)


def test_the_next_dates_are_of_the_time_zone() -> None:
    for timezone in ("UTC", "Asia/Shanghai", "America/New_York"):
        dates = check_cron("30 3 * * 1", timezone)
        assert [(date.weekday(), date.hour, date.minute) for date in dates] == [(0, 3, 30)] * 3
        assert all(timedelta(days=6) < later - date < timedelta(days=8) for date, later in pairwise(dates))
    assert check_cron("*/15 */6 * * *")[0].minute % 15 == 0
    with pytest.raises(BadParams, match="is not a time zone"):
        check_cron("0 3 * * *", "Mars/Olympus")


def test_names_tell_folders_of_the_same_name_apart() -> None:
    one, other = name_of(Path("/a/my models")), name_of(Path("/b/my models"))
    assert one != other
    assert re.fullmatch(r"my-models-[0-9a-f]{6}", one)
    assert re.fullmatch(r"workspace-[0-9a-f]{6}", name_of(Path("/数据")))


def noted(workspace: Path) -> dict[str, Any]:
    """The server that `temper schedule` wrote down."""
    try:
        found: dict[str, Any] = json.loads((workspace / ".temper" / "prefect-server.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def deployments(workspace: Path) -> list[dict[str, Any]]:
    """What the server knows; empty while it does not answer."""
    try:
        found: list[dict[str, Any]] = httpx.post(f"{noted(workspace)['api']}/deployments/filter", json={}).json()
    except (httpx.HTTPError, KeyError):
        return []
    return found


def test_a_schedule_is_served_runs_survives_its_server_and_goes(copy: Path) -> None:
    (copy / ".temper" / "prefect-server.json").unlink(missing_ok=True)
    assert "no schedules" in temper(copy, "schedule", "--list").stdout
    with Beside(copy, "schedule", "--cron", "0 3 * * *") as serving:
        wait_for("deployment", lambda: deployments(copy), serving)
        (deployment,) = deployments(copy)
        assert deployment["schedules"][0]["schedule"]["cron"] == "0 3 * * *"
        row = re.compile(rf"{name_of(copy)} +cron 0 3 \* \* \* +active +\d{{4}}-\d\d-\d\dT03:00:00")
        # the server plans the next runs of a new deployment within seconds
        wait_for("next run", lambda: row.search(temper(copy, "schedule", "--list").stdout), serving)

        # a scheduled run in which nothing has changed
        api = noted(copy)["api"]
        run = httpx.post(f"{api}/deployments/{deployment['id']}/create_flow_run", json={}).json()["id"]

        def state() -> str:
            return str(httpx.get(f"{api}/flow_runs/{run}").json()["state"]["type"])

        wait_for("end of the run", lambda: state() in ("COMPLETED", "FAILED", "CRASHED"), serving)
        assert state() == "COMPLETED", serving.said()

        def logs() -> list[str]:
            found = httpx.post(f"{api}/logs/filter", json={"logs": {"flow_run_id": {"any_": [run]}}}).json()
            return [log["message"] for log in found]

        wait_for("word of it in the log", lambda: "nothing has changed since the last run" in logs(), serving)

        # its server dies; what was paused is still paused when the next one has come up
        assert "paused" in temper(copy, "schedule", "--pause").stdout
        first = noted(copy)["pid"]
        psutil.Process(first).kill()
        wait_for("new server", lambda: noted(copy)["pid"] != first and deployments(copy), serving)
        assert "paused" in temper(copy, "schedule", "--list").stdout
        assert "resumed" in temper(copy, "schedule", "--resume").stdout
        assert deployments(copy)[0]["paused"] is False

        assert "removed" in temper(copy, "schedule", "--remove").stdout
        assert deployments(copy) == []
        second = noted(copy)["pid"]
        serving.process.send_signal(signal.SIGINT)
        wait_for("its end", lambda: serving.process.poll() is not None, serving, 180)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(second) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(second)
