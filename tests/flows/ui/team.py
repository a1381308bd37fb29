"""The pages of a workspace, for somebody of each role."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from flows.serve.app import make_app
from flows.serve.exchange import Service
from flows.serve.keys import ROLES, Key, new_key, read_keys
from flows.serve.record import Record
from flows.serve.routing import Models, Plan
from flows.serve.server import Options, make_service
from flows.serve.versions import Reference
from flows.ui.app import add_pages
from tasks.core.parquet import text_schema, write_records, write_rows
from tasks.core.records import ChatExample, LabelledReply, Message, PreferencePair, SeqPair, TextExample
from tasks.core.records import Record as Row

HERE = "http://127.0.0.1:8000"
NAMES = dict(zip(ROLES, ("vera", "lena", "anna"), strict=True))
"""Who has which role."""

ROWS: Sequence[Row] = (
    ChatExample(
        id="c/1 & 2",
        source="chats",
        file="chats.jsonl",
        row=3,
        messages=(Message("user", "Mail <b>me</b>\nat a@b.org"), Message("assistant", "Yes.")),
    ),
    PreferencePair(id="p", source="pairs", prompt=(Message("user", "Why?"),), chosen="So.", rejected="So."),
    LabelledReply(id="l", source="said", prompt=(Message("user", "Is it?"),), reply="No\r\nidea", label=False),
    TextExample(id="t", source="texts", text="An old text."),
    SeqPair(id="s", source="seqs", input="one", target="eins"),
)
"""A row of each kind."""


def quarantine_some(workspace: Path) -> None:
    """Writes the quarantine of `validate`, with a row of each kind."""
    folder = workspace / "data" / "quarantine"
    folder.mkdir(parents=True)
    write_records(folder, ROWS)
    reasons = [
        {"id": row.id, "source": row.source, "place": f"{row.file}:{row.row}" if row.file else row.id, "reason": why}
        for row in ROWS
        for why in ("it is odd", *(["it names a person"] if row.id == "t" else []))
    ]
    write_rows(folder / "reasons.parquet", reasons, text_schema(("id", "source", "place", "reason")))


class Team:
    """The pages, and the keys of those who look at them."""

    def __init__(self, root: Path, service: Service, keys: Mapping[str, str]) -> None:
        self.root, self.service, self.keys = root, service, keys
        self.app = make_app(service)
        assert add_pages(root, self.app, service) == "/ui"

    @classmethod
    @contextmanager
    def at(cls, root: Path, record: Path, *models: Path, open_to_all: bool = False) -> Iterator[Team]:
        """Serves the pages of a workspace, with models if there are any."""
        made = {role: new_key(name, role) for role, name in NAMES.items()}
        made["nobody"] = new_key("program")
        found: list[Key] = []
        if not open_to_all:
            (root.parent / "keys").write_text("\n".join(line for _, line in made.values()))
            found = read_keys(root.parent / "keys", {})
        served, kept = Models(Plan([Reference(str(folder)) for folder in models], {}), root, print), Record(record)
        served.begin()
        try:
            service = make_service(served, Options(keys=found), kept)
            yield cls(root, service, {role: key for role, (key, _) in made.items()})
        finally:
            served.close(finish=True)
            kept.close()

    def client(self, role: str | None = None) -> Person:
        """Somebody's browser: of a role, logged in with its key; without one, not logged in."""
        person = Person(self.app, base_url=HERE, follow_redirects=False)
        if role:
            answer = person.post("/ui/login", data={"key": self.keys[role]})
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")
        return person


class Person(TestClient):
    """A browser that sends forms as pages have them."""

    def read(self, path: str, **query: str) -> str:
        """The text of a page."""
        answer = self.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return str(answer.text)

    def token(self) -> str:
        """The token of this session's forms."""
        found = re.search(r'name="csrf" value="([^"]+)"', self.read("/ui/history"))
        assert found is not None
        return found[1]

    def submit(self, path: str, **fields: Any) -> Any:
        """Sends a form of this session's."""
        return self.post(path, data={"csrf": self.token(), **fields})
