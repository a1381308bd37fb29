"""Journal of a model's answers, kept by question: so an interrupted evaluation goes on, and none is done twice.

A journal belongs to one identity: the digests of weights, adapter and template, the settings and the code. Its folder's
name is the digest of that, and each file in it that of the question. Work is requested in parts that depend on
nothing but the work as a whole, so that a part gives the same whether it is done in one go or after a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from tasks.core.artifacts import as_json, atomic_write
from tasks.core.errors import BadData
from tasks.core.layout import CLONE
from tasks.core.pipeline import code_folders

T = TypeVar("T")
IDENTITY = "identity.json"

BATCHES = 8
"""A part of the work is so many batches."""


def cache_key(value: Any) -> str:
    """Compute the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, sort_keys=True).encode()).hexdigest()


@lru_cache
def code_digest() -> str:
    """Return the digest of all code that evaluates, and of the versions of the libraries that compute.

    The code is what dvc.yaml says that the stage `evaluate` depends on, so the two cannot drift apart.
    """
    from importlib.metadata import version

    files = [file for folder in code_folders(CLONE, "evaluate") for file in (CLONE / folder).rglob("*.py")]
    lines = [f"{file.relative_to(CLONE)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    lines += [f"{name} {version(name)}" for name in ("lm-eval", "peft", "tokenizers", "torch", "transformers")]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


class AnswerCache:
    """The kept answers of one model under one set of settings.

    Args:
        root: the folder of all journals; None to keep nothing.
        identity: what the answers depend on besides the questions.

    Raises:
        BadData: the folder of this identity holds another's answers.
    """

    def __init__(self, root: Path | None, identity: Mapping[str, str]) -> None:
        self.identity, self.key = dict(identity), cache_key(dict(identity))
        self.folder = root / self.key if root else None
        if self.folder is None:
            return
        file = self.folder / IDENTITY
        if not file.is_file():
            atomic_write(file, as_json(self.identity))
        found = json.loads(file.read_text())
        if found != self.identity:
            raise BadData(
                f"results belong to digest {cache_key(found)[:12]}",
                where=str(self.folder),
                examples=[f"{name}: {found.get(name)}, here {self.identity[name]}" for name in sorted(self.identity)
                          if found.get(name) != self.identity[name]],
                expected=f"digest {self.key[:12]}",
                fix="remove the folder",
            )  # fmt: skip

    def recall(self, asked: Any, work: Callable[[], T]) -> T:
        """Return what `work` gives: as it was kept, or done now and kept.

        Args:
            asked: what the work depends on besides the identity; a value that JSON can hold.
            work: gives a value that JSON can hold.

        Raises:
            BadData: what was kept is of another identity or another question, or was altered.
        """
        if self.folder is None:
            return work()
        key = cache_key(asked)
        file = self.folder / f"{key}.json"
        if file.is_file():
            kept: T = self._kept(file, key)
            return kept
        result = work()
        about = {"identity": self.key, "asked": key, "sha256": cache_key(result), "result": result}
        atomic_write(file, json.dumps(about, ensure_ascii=False, allow_nan=False))
        return result

    def _kept(self, file: Path, key: str) -> Any:
        try:
            kept = json.loads(file.read_text())
            said = (kept["identity"], kept["asked"], kept["sha256"])
            result = kept["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadData("is no kept result", where=str(file), got=str(error), fix="remove the file") from error
        if said[:2] != (self.key, key):
            raise BadData(
                f"results belong to digest {said[0][:12]}",
                where=str(file),
                expected=f"digest {self.key[:12]}",
                fix="remove the file",
            )
        if cache_key(result) != said[2]:
            raise BadData("results were altered after they were kept", where=str(file), fix="remove the file")
        return result


def parts(lengths: Sequence[int], groups: Sequence[str], most: int) -> list[list[int]]:
    """Work in parts, as places: longest first, those of a group together, about `most` in each.

    Args:
        lengths: of each piece, or of its group's common beginning.
        groups: what is computed once for several pieces.
        most: pieces in a part; a group is never cut, so a part may have more.
    """
    order = sorted(range(len(groups)), key=lambda n: (-lengths[n], groups[n], n))
    found: list[list[int]] = []
    for place, number in enumerate(order):
        starts_group = place == 0 or groups[order[place - 1]] != groups[number]
        if not found or (starts_group and len(found[-1]) >= most):
            found.append([])
        found[-1].append(number)
    return found
