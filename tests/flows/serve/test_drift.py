"""Drift of what is asked and answered: the numbers, the command, the page and the figures of a server."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bench.registered import workspace_at
from flows.run.data_page import NUMBERS, WRITTEN_PAGE
from flows.serve.drift import Drift, drifted, prompts_of, read_drift, training_profile
from flows.serve.record import Conversation, open_record
from flows.serve.record_database import url_of
from tasks.core.errors import BadParams
from tasks.core.parquet import record_schema
from tasks.core.records import ChatExample, Message, PreferencePair, Record
from tasks.validate.profile import columns_of, counted, shift
from tasks.validate.row_features import row_features
from tests.conftest import Beside, temper, wait_for
from tests.flows.serve.test_record import conversation

SHORT = [f"What is {n} plus {n + 2}?" for n in range(60)]
LONG = [f"{text} Say in a whole sentence how you came to that, please. " * 8 for text in SHORT]
DAY_S = 86_400.0


def profile_of(rows: Iterable[Record], kind: str = "chat") -> dict[str, Any]:
    import pyarrow as pa

    fields = [
        {name: _plain(getattr(row, name)) for name in record_schema(kind).names if hasattr(row, name)} for row in rows
    ]
    table = pa.Table.from_pylist(fields, schema=record_schema(kind))
    return counted(row_features(table, kind))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [each._asdict() if isinstance(each, Message) else each for each in value]
    return value


def trained(texts: Iterable[str]) -> dict[str, Any]:
    return profile_of(
        ChatExample(id=text, source="s", messages=(Message("user", text), Message("assistant", "a long reply " * 50)))
        for text in texts
    )


def asked(name: str, text: str, reply: str = "Hi", finish: str = "stop", **fields: Any) -> Conversation:
    answers = [{"role": "assistant", "content": reply, "finish_reason": finish}]
    return conversation(name, text, answers=answers, **{"version": "m/1", "user": name, **fields})


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_the_index_that_chance_gives_is_the_mean_of_many_draws() -> None:
    """300 rows now and 900 before of the same eight bins, two thousand times, with a fixed seed."""
    random = np.random.default_rng(7)
    shares = np.array([0.05, 0.1, 0.2, 0.25, 0.15, 0.1, 0.1, 0.05])
    found = [
        shift(*(dict(enumerate(map(int, random.multinomial(rows, shares)))) for rows in (300, 900)))
        for _ in range(2000)
    ]
    assert {each.expected for each in found} == {7 * (1 / 300 + 1 / 900)}
    # its standard error is the square root of 14, times 1/300 + 1/900, by the root of 2,000: 0.0004
    assert np.mean([each.psi for each in found]) == pytest.approx(found[0].expected, abs=0.0015)


def test_an_empty_bin_of_both_is_none() -> None:
    found = shift({0: 5, 1: 5, 2: 0}, {0: 8, 1: 2, 3: 0})
    assert tuple(found) == pytest.approx((0.415888, (2 - 1) * (1 / 10 + 1 / 10), 10, 10), abs=1e-6)


def test_prompts_are_counted_as_training_rows_are_whatever_their_kind() -> None:
    """The replies do not count, nor whether there are two; and who answered does not."""
    columns, left_out, versions = prompts_of(
        [
            *(asked(text, text) for text in SHORT),
            asked("unseen", LONG[0], route="shadow"),
            asked("completion", "x", endpoint="completions"),
        ]
    )
    pairs = profile_of(
        (
            PreferencePair(id=t, source="s", prompt=(Message("user", t),), chosen="yes " * 99, rejected="")
            for t in SHORT
        ),
        "preference",
    )
    for rows in (trained(SHORT), pairs):
        assert columns == {name: bins for name, bins in columns_of(rows).items() if name.startswith("prompt_")}
    assert (left_out, versions) == (1, Counter({"m/1": 60}))


def test_turns_of_all_forms_are_read() -> None:
    turns = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "12", "tool_call_id": "a"},
    ]
    columns, _, _ = prompts_of([asked("a", "")._replace(prompt=turns)])
    by_hand = ChatExample(
        id="a", source="s", messages=tuple(map(Message, ("system", "user", "tool"), ("Be kind.", "Hi you", "12")))
    )
    found = columns_of(profile_of([by_hand]))
    assert columns == {name: found[name] for name in columns}


# --- a record ---------------------------------------------------------------------------------------------------------


def recorded(file: Path, conversations: Iterable[Conversation], ages: dict[str, float] | None = None) -> None:
    """Record conversations, some of them so many days ago."""
    import sqlite3

    with closing(open_record(file, write=True)) as record:
        for each in conversations:
            record.add(each)
    with sqlite3.connect(file) as database:
        for prefix, days in (ages or {}).items():
            database.execute(
                "update conversations set time = ? where id like ?", (time.time() - days * DAY_S, f"{prefix}%")
            )
    database.close()


def of_record(file: Path, texts: Iterable[str]) -> Drift:
    return read_drift(url_of(file), trained(texts), days=7)


def test_prompts_of_another_kind_drift_and_the_same_ones_do_not(tmp_path: Path) -> None:
    recorded(tmp_path / "said.db", [asked(f"{n}-{text}", text) for text in SHORT for n in range(4)])
    same, other = of_record(tmp_path / "said.db", SHORT), of_record(tmp_path / "said.db", LONG)
    assert same.prompts == 240
    assert drifted(same, least=60) == []
    moved = drifted(other, least=60)
    assert [each.partition(":")[0] for each in moved] == ["prompt characters", "prompt words"]
    assert drifted(other, limit=1000, least=60) == drifted(other, least=61) == []  # 60 rows were trained on


def test_answers_are_compared_with_the_first_of_their_version(tmp_path: Path) -> None:
    old = [asked(f"old-{n}", "Hi", version="m/2") for n in range(80)]
    now = [
        *(asked(f"now-{n}", "Hi", "I'm sorry, but I cannot", version="m/2", seconds=2.0) for n in range(40)),
        *(asked(f"now-cut-{n}", "Hi", "and so on", "length", version="m/2", seconds=2.0) for n in range(60)),
        asked("now-other", "Hi", version="m/1"),
    ]
    recorded(tmp_path / "said.db", [*old, *now], {"old": 20})
    found = of_record(tmp_path / "said.db", SHORT)
    assert found.answers is not None
    assert (found.answers.version, found.answers.now.total, found.answers.first.total) == ("m/2", 100, 80)
    shares = {name: (each.new, each.old) for name, each in found.answers.shares.items()}
    assert shares == {"cut": (0.6, 0.0), "empty": (0.0, 0.0), "decline": (0.4, 0.0)}
    assert (found.answers.now.seconds, found.answers.first.seconds) == (2.0, 0.2)
    reasons = drifted(found, limit=1000, least=80)
    assert reasons == ["answers cut: 60.0%, were 0.0%", "answers decline: 40.0%, were 0.0%"]
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_versions_first_days_are_compared_with_nothing(tmp_path: Path) -> None:
    recorded(tmp_path / "said.db", [asked("new", "Hi"), asked("old", "Hi")], {"old": 10})
    assert of_record(tmp_path / "said.db", SHORT).answers is None  # the seven days from then on are not over
    recorded(tmp_path / "none.db", [])
    nothing = of_record(tmp_path / "none.db", SHORT)
    assert (nothing.prompts, nothing.columns, nothing.answers, drifted(nothing)) == (0, {}, None, [])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace that trained on short questions, as far as its profile tells."""
    folder = workspace_at(tmp_path / "workspace")
    numbers: dict[str, Any] = {name: {} for name in ("sources", "checks", "rows", "repairs", "contamination")}
    numbers |= {"quarantine": [], "refused": [], "duplicates": {"exact": 0, "near": 0, "examples": []}}
    (folder / NUMBERS).parent.mkdir(parents=True)
    (folder / NUMBERS).write_text(json.dumps({**numbers, **trained(SHORT * 5)}))
    return folder


def test_the_command_ends_with_3_where_something_drifted(workspace: Path, tmp_path: Path) -> None:
    record = str(tmp_path / "said.db")
    recorded(tmp_path / "said.db", [asked(f"{n}-{text}", text) for text in LONG for n in range(4)])
    done = temper(workspace, "drift", "--record", record, code=3)
    assert "drifted: prompt characters: stability index" in done.stdout
    page = (workspace / WRITTEN_PAGE).read_text()
    assert "240 prompts of" in page
    assert "Drifted: prompt characters" in page
    assert "://" not in page
    told = json.loads(temper(workspace, "drift", "--record", record, "--limit", "1000", "--json").stdout)
    assert told["reasons"] == []
    assert told["columns"]["prompt_turns"] == {"psi": 0, "expected": 0, "rows": 240, "rows_before": 300}
    assert "too few to say" in temper(workspace, "drift", "--record", record, "--least", "250").stdout
    assert "no record is named" in temper(workspace, "drift", code=65).stderr
    (workspace / NUMBERS).unlink()
    assert "has no profile of the prompts" in temper(workspace, "drift", "--record", record, code=65).stderr


def test_a_profile_of_before_is_refused(workspace: Path) -> None:
    (workspace / NUMBERS).write_text(json.dumps({"histograms": {"turns": [1, 2]}, "scripts": {"latin": 3}}))
    with pytest.raises(BadParams, match="has no profile of the prompts"):
        training_profile(workspace)


def test_a_server_tells_prometheus(workspace: Path, pico_base: Path, tmp_path: Path) -> None:
    recorded(tmp_path / "said.db", [asked(text, text) for text in (*SHORT, *LONG)])
    words = ("serve", str(pico_base), "--workspace", ".", "--port", "0", "--record", str(tmp_path / "said.db"))
    with Beside(workspace, *words) as server:
        wait_for("address", lambda: re.search(r"serving base at \S+/v1", server.said()), server)
        found = re.search(r"serving base at (\S+)/v1", server.said())
        assert found is not None

        def figures() -> dict[str, float]:
            text = httpx.get(f"{found[1].removesuffix('/v1')}/metrics", timeout=60).text
            return {name: float(value) for name, value in re.findall(r"(?m)^(temper_drift\S+) (\S+)$", text)}

        wait_for("drift", figures, server)
        told = figures()
    # two bins: 60 and 60 prompts, 300 and no training rows, which count as a share of 0.0001
    by_hand = (0.5 - 1) * math.log(0.5 / 1) + (0.5 - 0.0001) * math.log(0.5 / 0.0001)
    assert told['temper_drift{column="prompt_characters"}'] == pytest.approx(by_hand)
    assert told['temper_drift_by_chance{column="prompt_characters"}'] == pytest.approx(1 / 120 + 1 / 300)
