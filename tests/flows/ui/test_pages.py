"""What the pages show, to whom, and what a browser may do with them."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench.registered import workspace_at
from flows.run.lock import held, holder, state_folder
from flows.serve.errors import ApiError
from flows.serve.keys import ROLES, Gatekeeper, Key, new_key
from flows.ui import runs
from flows.ui.app import PAGES
from flows.ui.sessions import LIFETIME_S, Sessions
from flows.ui.site import NAVIGATION, POLICY
from tasks.core.artifacts import as_json
from tasks.orchestration.run_journal import StageResult, journal_file, record
from tests.conftest import ROOT
from tests.flows.ui.team import HERE, NAMES, Team

PLACES = [place for place, _ in NAVIGATION]


class Elements(HTMLParser):
    """The elements of a page with their attributes, and what stands inside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found, self.inside = list[tuple[str, dict[str, str | None]]](), ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inside += data.strip()


def test_every_page_is_in_the_navigation() -> None:
    assert len(PAGES) == len(NAVIGATION)


@pytest.mark.parametrize(
    "place", [*PLACES, "/promotions/2", "/live", "/quarantine/row?id=t", "/compare?first=1&second=2"]
)
def test_nothing_on_a_page_is_run_but_the_servers_own_files(team: Team, place: str) -> None:
    answer = team.client("approver").get(f"/ui{place}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    page = Elements(answer.text)
    assert page.inside == ""
    for tag, attributes in page.found:
        assert not any(name == "style" or name.startswith(("on", "hx-on")) for name in attributes), (tag, attributes)
        for name in ("href", "src", "action", "hx-get", "hx-post"):
            assert str(attributes.get(name) or "/ui").startswith(("/ui", "#")), (tag, attributes)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = [each for each in page.found if each[0] in ("input", "select", "textarea")]
    assert answer.text.count("<label") >= len([1 for _, each in labelled if each.get("type") != "hidden"])


def test_its_own_files_are_there_and_are_what_is_noted_of_them(team: Team) -> None:
    import hashlib

    noted = (ROOT / "flows" / "ui" / "static" / "README.md").read_text()
    client = team.client()  # also for whoever has not logged in
    assert hashlib.sha256(client.get("/ui/htmx.min.js").content).hexdigest() in noted
    style = client.get("/ui/style.css")
    assert style.headers["content-type"].startswith("text/css")
    assert "prefers-color-scheme: dark" in style.text
    for name in ("keys.js", "icon.svg"):
        assert client.get(f"/ui/{name}").status_code == 200
    assert client.get("/").headers["location"] == "/ui/"


def test_a_workspace_in_which_nothing_has_run_has_all_pages(tmp_path: Path) -> None:
    root = workspace_at(tmp_path / "new")
    with Team.at(root, tmp_path / "said.db", open_to_all=True) as team:
        person = team.client()
        said = {place: person.read(f"/ui{place}") for place in PLACES}
    assert "Nothing has run here yet" in said["/"]
    assert "No model was evaluated yet" in said["/methods"]
    assert "fewer are registered" in said["/compare"]
    assert "No model is in memory" in said["/chat"]
    assert "Nothing is registered yet" in said["/promotions"]
    assert "No row is in quarantine" in said["/quarantine"]
    assert "Nothing was promoted yet" in said["/history"]
    assert "Nothing was validated yet" in said["/data"]


# --- who may what -----------------------------------------------------------------------------------------------------


def test_without_keys_this_machines_user_is_approver_and_no_other_host_is_answered(
    workspace: Path, tmp_path: Path
) -> None:
    with Team.at(workspace, tmp_path / "said.db", open_to_all=True) as team:
        person = team.client()
        assert ", approver" in person.read("/ui/")
        assert "Log out" not in person.read("/ui/")
        for place in (*PLACES, "/login"):
            answer = person.get(f"/ui{place}", headers={"Host": "evil.example:8000"})
            assert answer.status_code == (200 if place == "/login" else 403)
            assert "temper-tiny" not in answer.text


def test_whoever_has_not_logged_in_sees_nothing(team: Team) -> None:
    person = team.client()
    for place in PLACES:
        answer = person.get(f"/ui{place}")
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login")
    part = person.get("/ui/live", headers={"HX-Request": "true"})
    assert (part.status_code, part.headers["hx-redirect"], part.text) == (401, "/ui/login", "")


def test_a_key_logs_in_where_it_has_a_role_and_its_cookie_is_the_servers_alone(team: Team) -> None:
    person = team.client()
    for key, status, said in (("temper-wrong", 401, "is not known"), (team.keys["nobody"], 403, "for the API alone")):
        answer = person.post("/ui/login", data={"key": key})
        assert answer.status_code == status
        assert said in answer.text
        assert "set-cookie" not in answer.headers
    cookie = person.post("/ui/login", data={"key": team.keys["viewer"]}).headers["set-cookie"]
    assert re.fullmatch(r"temper_session=\S{43}; HttpOnly; Path=/ui; SameSite=strict", cookie)
    page = person.read("/ui/")
    assert f"{NAMES['viewer']}, viewer" in page
    assert person.submit("/ui/logout").headers["location"] == "/ui/login"
    assert person.get("/ui/").status_code == 303
    other = team.client()
    assert (
        other.post("/ui/login", data={"key": team.keys["viewer"]}, headers={"Sec-Fetch-Site": "cross-site"}).status_code
        == 403
    )


def test_a_session_ends_by_itself() -> None:
    now = 0.0
    key, line = new_key("lena", "labeller")
    sessions = Sessions(Gatekeeper([Key("lena", line.split(":")[1], role="labeller")]), clock=lambda: now)
    token = sessions.begin(key)
    found = sessions.find(token, "any.example")
    assert found is not None
    assert [found.may(role) for role in ROLES] == [True, True, False]
    assert sessions.find(token + "x", None) is None
    now = LIFETIME_S
    assert sessions.find(token, None) is None
    with pytest.raises(ApiError):
        sessions.begin(line)


ACTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("/ui/compare", {"first": "1", "second": "2", "item": "?", "better": "1"}, "labeller"),
    ("/ui/chat/ask", {"prompt": "Hello", "first": "m", "second": "m"}, "labeller"),
    ("/ui/chat/vote", {"better": "a", "other": "b"}, "labeller"),
    ("/ui/quarantine/row", {"id": "t", "why": "fine", "decision": "release", "text": "x"}, "labeller"),
    ("/ui/promotions/2", {"decision": "approve", "reason": "better"}, "approver"),
    ("/ui/history", {"reason": "worse"}, "approver"),
]


@pytest.mark.parametrize(("place", "fields", "needed"), ACTIONS, ids=[place for place, *_ in ACTIONS])
def test_an_action_needs_its_role_and_its_sessions_own_form(
    team: Team, place: str, fields: dict[str, Any], needed: str
) -> None:
    team.client("viewer").read("/ui/history")  # a copied workspace's registry is put right by the first look
    before = {file: file.read_bytes() for file in team.root.rglob("*") if file.is_file()}
    for role in ROLES:
        person = team.client(role)
        own = person.token()
        if ROLES.index(role) < ROLES.index(needed):
            answer = person.post(place, data={**fields, "csrf": own})
            assert answer.status_code == 403
            assert f"needs the role {needed}" in answer.text
        for token in ({}, {"csrf": ""}, {"csrf": team.client("approver").token()}, {"csrf": "é"}):
            assert person.post(place, data={**fields, **token}).status_code == 403
        elsewhere = {"Sec-Fetch-Site": "cross-site"}
        assert person.post(place, data={**fields, "csrf": own}, headers=elsewhere).status_code == 403
        assert person.post(place, json={**fields, "csrf": own}).status_code in (403, 415)
    assert {file: file.read_bytes() for file in team.root.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "body", [b"csrf=%ff", b"=&" * 5000, b"x" * (5 << 20)], ids=["no UTF-8", "many fields", "large"]
)
def test_what_is_no_form_is_refused(team: Team, body: bytes) -> None:
    person = team.client("approver")
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert person.post("/ui/history", content=body, headers=kind).status_code in (400, 403, 413)


def test_a_page_that_fails_says_so_and_not_why(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the secret")

    monkeypatch.setattr(runs, "live", broken)
    answer = team.client("viewer").get("/ui/")
    assert answer.status_code == 503
    assert "the secret" not in answer.text
    assert answer.headers["content-security-policy"] == POLICY
    assert team.client("viewer").get("/ui/nothing").status_code == 404


# --- what runs where --------------------------------------------------------------------------------------------------


def test_who_holds_the_workspace_is_told_without_taking_it(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with held(tmp_path, "temper run"):
        found = holder(tmp_path)
        assert found is not None
        assert found.purpose == "temper run"
    assert holder(tmp_path) is None  # though the note is still there


def test_stages_that_run_now_are_found_by_their_commands(tmp_path: Path) -> None:
    root = workspace_at(tmp_path / "work")
    state_folder(root)
    record(root, StageResult("validate", "completed", 3.0, "key"))
    with journal_file(root).open("a") as journal:
        journal.write("{cut")
    command = "python -m tasks.render --clean data/clean --base data/base --out data/rendered"
    script = (
        "import subprocess, sys\nfrom pathlib import Path\nfrom flows.run.lock import held\n"
        f"with held(Path({str(root)!r}), 'temper run'):\n"
        f"    child = subprocess.Popen(['bash', '-c', 'exec -a \"{command}\" sleep 60'])\n"
        "    print('holds', flush=True)\n    sys.stdin.read()\n    child.kill()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "holds\n"
        found = runs.live(root, [])
        for _ in range(500):
            if found["running"]:
                break
            found = runs.live(root, [])
        assert process.stdin
        process.stdin.close()
    assert found["running"] == ["render"]
    assert found["holder"].pid == process.pid
    assert [each["stage"] for each in found["recent"]] == ["validate"]
    assert runs.live(root, [])["holder"] is None


def test_the_data_page_has_the_profile_and_the_drift(team: Team) -> None:
    rows = dict.fromkeys(("checked", "clean", "quarantined", "merged", "repaired", "refused"), 5)
    numbers: dict[str, Any] = {
        "rows": rows,
        "sources": {},
        "checks": {},
        "quarantine": [{"reason": "<i>odd</i>", "rows": 2, "examples": ["a:1"]}],
        "refused": [],
        "duplicates": {"exact": 1, "near": 0, "examples": []},
        "contamination": {},
        "repairs": {},
        "histograms": {name: [1, 2] for name in ("characters", "words", "turns")},
        "scripts": {"latin": 5},
    }
    (team.root / "data" / "validation").mkdir()
    (team.root / "data" / "validation" / "profile.json").write_text(as_json(numbers))
    page = team.client("viewer").read("/ui/data")
    assert "&lt;i&gt;odd&lt;/i&gt;" in page
    assert "There is no earlier run to compare with" in page
    assert "Drift of what is asked" not in page  # that profile is of an earlier temper

    numbers["histograms"] |= {f"prompt_{name}": [1, 2] for name in ("characters", "words", "turns")}
    (team.root / "data" / "validation" / "profile.json").write_text(as_json(numbers | {"prompt_scripts": {"latin": 3}}))
    page = team.client("viewer").read("/ui/data")
    assert "Drift of what is asked" in page
    assert "0 prompts of" in page
    assert "Fewer than 200 tell nothing" in page


def test_the_api_is_beside_the_pages(team: Team) -> None:
    answer = team.client().get("/v1/models", headers={"Authorization": f"Bearer {team.keys['viewer']}"})
    assert answer.json() == {"object": "list", "data": []}
    assert str(answer.url).startswith(HERE)
