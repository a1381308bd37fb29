"""`temper push` and `temper chat --adapter`, as a user types them, with a hub in this process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tasks.adapters.attach import attach
from tasks.adapters.files import PUBLISHED
from tasks.core.records import Message
from tasks.inference.chat import answer
from tasks.models.loader import load_model
from tasks.registry.versions import fetch_adapter
from tasks.tokenization.chat_template import load_tokenizer
from tests.conftest import temper
from tests.helpers import hub as hubs
from tests.tasks.adapters.test_files import published


def test_push_then_ask_one_base_with_adapters_from_a_folder_and_the_hub(
    workspace: Path, pico_base: Path, tmp_path: Path
) -> None:
    published(pico_base, "lora", workspace / "mine")
    published(pico_base, "loreft", workspace / "its edits")
    with hubs.running() as hub:
        environment: dict[str, Any] = hubs.environment(hub, tmp_path / "home")
        first = temper(workspace, "push", "mine", "me/adapter", "--private", **environment)
        assert hub.private == {"me/adapter"}
        pinned = first.stdout.strip()
        assert re.fullmatch(r"hub:me/adapter@[0-9a-f]{40}", pinned)
        again = temper(workspace, "push", "mine", "me/adapter", **environment)
        assert again.stdout.splitlines() == [pinned, "nothing changed: this is what was there"]
        assert hubs.TOKEN not in first.stdout + first.stderr + again.stdout + again.stderr
        words = ("chat", "What is 17 plus 25?", "--model", "models/tiny", "--max-tokens", "8")
        chosen = ("--adapter", "mine", "--adapter", pinned, "--adapter", "its edits")
        replies = temper(workspace, *words, *chosen, **environment).stdout
    mine, theirs, edits = re.split(rf"^{workspace}/mine: |^{pinned}: |^{workspace}/its edits: ", replies, flags=re.M)[
        1:
    ]
    assert mine == theirs
    assert mine != edits  # of random numbers, but not the same ones
    alone = attach(load_model(pico_base), workspace / "mine")
    said = answer(alone, load_tokenizer(pico_base), [Message("user", "What is 17 plus 25?")], 8)
    assert mine == f"{said.text}\n"


def test_a_registered_version_gives_its_adapter(copy: Path) -> None:
    """Also of a method whose model holds it merged."""
    for method in ("qlora", "reft"):
        folder = fetch_adapter(copy, f"models:/temper-tiny@{method}")
        for name in PUBLISHED:
            assert (folder / name).read_bytes() == (copy / "data" / "adapters" / method / name).read_bytes()
    words = ("chat", "What is 17 plus 25?", "--max-tokens", "4", "--adapter", "models:/temper-tiny@reft")
    assert temper(copy, *words).stdout == temper(copy, *words[:4], "--model", "data/models/reft").stdout


def test_what_cannot_be_used_is_one_message(workspace: Path, tmp_path: Path) -> None:
    for words, code, said in (
        (("chat", "x", "--model", "models/tiny", "--adapter", "hub:me/adapter@main"), 65, "is not pinned"),
        (("push", "models/tiny", "me/model"), 65, "there is no token for the hub"),
    ):
        told = temper(workspace, *words, code=code, HF_HOME=str(tmp_path), HF_TOKEN="").stderr
        assert said in told
        assert "Traceback" not in told
