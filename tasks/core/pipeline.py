"""`dvc.yaml` as the stages read it: which stage reads what, and the one identity of what it read.

DVC stays the judge of what is up to date. A stage that runs only has to know its own dependencies, for its content
key and to notice an edit while it runs; resolving them here takes milliseconds, importing DVC most of a second. A
contract test holds this reading against DVC's own, stage by stage and hash by hash.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.core.artifacts import digest
from tasks.core.errors import BadParams

PIPELINE = "dvc.yaml"
PARAMS = "params.yaml"
LOCK = "dvc.lock"


@dataclass(frozen=True)
class Node:
    """One stage of the graph, with the values of params.yaml filled in; paths are relative to the workspace."""

    name: str
    command: str
    deps: tuple[str, ...]
    params: Mapping[str, Any]
    outs: tuple[str, ...]


def find_workspace(start: Path) -> Path:
    """Find the nearest folder from `start` upward that holds a pipeline, as git finds a repository.

    Raises:
        BadParams: there is none.
    """
    for folder in (start, *start.parents):
        if (folder / PIPELINE).is_file() and (folder / PARAMS).is_file():
            return folder
    raise BadParams(
        "no workspace here or in any folder above",
        where=str(start),
        expected=f"a folder with {PIPELINE} and {PARAMS}",
        fix="change into your clone of temper",
    )


def load(workspace: Path, values: Mapping[str, Any] | None = None) -> dict[str, Node]:
    """All stages by their DVC name (`train@qlora`), in the order of dvc.yaml.

    Args:
        workspace: the folder with dvc.yaml.
        values: the content of params.yaml, if it is not to be read from the workspace.

    Raises:
        BadParams: params.yaml lacks keys that dvc.yaml names; DVC refuses that, too. All of them are named.
    """
    values = values or _read(workspace / PARAMS)
    stages = _read(workspace / PIPELINE)["stages"]
    _check_keys(stages, values)
    nodes: dict[str, Node] = {}
    for name, body in stages.items():
        for full_name, definition, scope in _instances(name, body, values):
            nodes[full_name] = Node(
                name=full_name,
                command=_fill(definition["cmd"], scope),
                deps=tuple(_fill(dep, scope) for dep in definition.get("deps", [])),
                params={key: _lookup(key, values) for key in (_fill(p, scope) for p in definition.get("params", []))},
                outs=tuple(
                    _fill(_path(out), scope) for kind in ("outs", "metrics") for out in definition.get(kind, [])
                ),
            )
    return nodes


def _check_keys(stages: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuses values that lack a key which a stage depends on: DVC knows no defaults."""
    missing: dict[str, None] = {}
    for name, body in stages.items():
        try:
            for _, definition, scope in _instances(name, body, values):
                for text in [definition["cmd"], *definition.get("deps", []), *definition.get("params", [])]:
                    for key in re.findall(r"\$\{(.+?)\}", text):
                        if not _stands(key, scope):
                            missing[key.replace("item", f"{_each(body)}.{scope.get('key', '')}", 1)] = None
                keys = [_fill(key, scope) for key in definition.get("params", [])]
                missing |= dict.fromkeys(key for key in keys if not _stands(key, values))
        except KeyError:
            missing[_each(body)] = None
    if missing:
        raise BadParams(
            "lacks keys by which DVC tells what to run again",
            where=PARAMS,
            examples=list(missing),
            fix="write them down: a section with nothing to say as `evaluate: {}`; docs/params.md has the defaults",
        )


def _each(body: Mapping[str, Any]) -> str:
    return str(body.get("foreach", "")).removeprefix("${").removesuffix("}")


def _stands(dotted: str, scope: Mapping[str, Any]) -> bool:
    try:
        _lookup(dotted, scope)
    except (KeyError, TypeError):
        return False
    return True


def code_folders(workspace: Path, stage: str) -> list[str]:
    """Return the folders of code that a stage depends on, such as `tasks/core`; of all its instances the same."""
    body = _read(workspace / PIPELINE)["stages"][stage]
    deps = (body["do"] if "foreach" in body else body)["deps"]
    return [dep for dep in deps if is_code(dep)]


def is_written_by_python(path: Path) -> bool:
    """Return whether Python wrote a file while code ran; DVC passes over such files too (.dvcignore)."""
    return path.suffix == ".pyc" or "__pycache__" in path.parts


def check_sources(workspace: Path, nodes: Mapping[str, Node]) -> None:
    """Check that everything exists that stages read and no stage writes.

    Raises:
        BadParams: something does not; names the stages that want it.
    """
    written = [out for node in nodes.values() for out in node.outs]
    missing = [
        f"{dep}, which {node.name} reads"
        for node in nodes.values()
        for dep in node.deps
        if not any(overlap(dep, out) for out in written) and not (workspace / dep).exists()
    ]
    if missing:
        raise BadParams(
            "names a path where there is nothing",
            where=PARAMS,
            examples=missing,
            fix="correct the path in params.yaml; the snapshot of a source of feedback is written by `temper feedback`",
        )


def content_key(workspace: Path, node: Node) -> str:
    """Compute the identity of what determines a stage's result: command, params, data and library versions.

    Params are what the file says and the defaults of what it does not say. Other code is not in the key: whether a
    stage reruns when code changes is DVC's decision, by the folders of code among its dependencies; a checkpoint of the
    same key goes on after a comment was changed.

    Returns:
        16 hex digits.
    """
    data = {dep: dvc_hash(workspace / dep) for dep in node.deps if not is_code(dep)}
    return key_of(node.command, data, node.params, declared_defaults(workspace, node.deps))


def recorded_keys(workspace: Path) -> dict[str, str]:
    """Compute the content key of every stage's last success, from the hashes in dvc.lock."""
    return {
        name: key_of(
            e["cmd"],
            {dep["path"]: dep["md5"] for dep in e.get("deps", []) if not is_code(dep["path"])},
            e.get("params", {}).get(PARAMS, {}),
            declared_defaults(workspace, [dep["path"] for dep in e.get("deps", [])]),
        )
        for name, e in _recorded(workspace).items()
    }


def recorded_files(workspace: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file of every recorded output with its MD5; folders are listed in DVC's cache."""
    for out in (out for entry in _recorded(workspace).values() for out in entry.get("outs", [])):
        path, md5 = workspace / out["path"], out["md5"]
        listing = workspace / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
        if not md5.endswith(".dir"):
            yield path, md5
        elif listing.is_file():
            yield from ((path / entry["relpath"], entry["md5"]) for entry in json.loads(listing.read_text()))


def read_lock(workspace: Path) -> str:
    """Read the text of dvc.lock; empty when there is none.

    DVC rewrites the file in place, so a reader beside it may see half of it: it is read while no DVC holds its lock.
    """
    lock, dvcs_own = workspace / LOCK, workspace / ".dvc" / "tmp" / "lock"
    with dvcs_own.open() if dvcs_own.is_file() else nullcontext() as held:
        if held:
            fcntl.flock(held, fcntl.LOCK_SH)
        return lock.read_text(encoding="utf-8") if lock.is_file() else ""


def _recorded(workspace: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    stages: dict[str, Any] = (YAML(typ="safe", pure=True).load(read_lock(workspace)) or {}).get("stages", {})
    return stages


def overlap(one: str, other: str) -> bool:
    """Return whether two paths are the same or one lies within the other."""
    a, b = PurePosixPath(one).parts, PurePosixPath(other).parts
    return a[: len(b)] == b or b[: len(a)] == a


def key_of(command: str, data: Mapping[str, str], params: Mapping[str, Any], defaults: Mapping[str, str]) -> str:
    """Compute the key for hashes that are known already, such as those in dvc.lock, under the libraries of now."""
    read = [command, sorted(data.items()), sorted(params.items()), sorted(defaults.items()), library_versions()]
    return hashlib.sha256(json.dumps(read, sort_keys=True, default=str).encode()).hexdigest()[:16]


def declared_defaults(workspace: Path, deps: Iterable[str]) -> dict[str, str]:
    """Return a digest of each module that declares params in the folders of code among some dependencies.

    It is of what such a module says to Python: another default changes it, a comment or a docstring does not.
    """
    files = [file for dep in deps if is_code(dep) for file in sorted((workspace / dep).glob("*params.py"))]
    return {str(file.relative_to(workspace)): _statements(file, file.stat().st_mtime_ns) for file in files}


@lru_cache
def _statements(file: Path, changed_ns: int) -> str:
    """Digest a module without its comments and docstrings; parsed again only when the file has changed."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [each for each in node.body if not _is_text(each)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@lru_cache
def library_versions() -> Mapping[str, str]:
    """Look up the versions of the libraries whose numbers a result is made of."""
    from importlib.metadata import version

    names = ("accelerate", "bitsandbytes", "numpy", "peft", "schedulefree", "tokenizers", "torch", "transformers")
    return {name: version(name) for name in names}


def is_code(dep: str) -> bool:
    """Return whether a dependency is a folder of code, and not data that somebody put below one."""
    return re.fullmatch(r"tasks/[a-z]+", dep) is not None


def dvc_hash(path: Path) -> str:
    """Compute the hash that DVC records for a file, or for a folder: the MD5 of its sorted listing.

    Raises:
        BadParams: there is nothing at that path.
    """
    if path.is_file():
        return digest(path, "md5")
    if not path.is_dir():
        raise BadParams(
            "does not exist", where=str(path), fix="correct the path in params.yaml, or run the stage that writes it"
        )
    files = sorted(p for p in path.rglob("*") if p.is_file() and not is_written_by_python(p.relative_to(path)))
    listing = sorted(
        ({"md5": digest(p, "md5"), "relpath": p.relative_to(path).as_posix()} for p in files),
        key=lambda entry: entry["relpath"],
    )
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def read_values(workspace: Path) -> dict[str, Any]:
    """Read the values of params.yaml, unchecked."""
    return _read(workspace / PARAMS)


def _read(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    content: dict[str, Any] = YAML(typ="safe", pure=True).load(path)
    return content


def _instances(
    name: str, body: dict[str, Any], values: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any], Mapping[str, Any]]]:
    if "foreach" not in body:
        yield name, body, values
        return
    for key, item in _lookup(_each(body), values).items():
        yield f"{name}@{key}", body["do"], {**values, "key": key, "item": item}


def _fill(text: str, scope: Mapping[str, Any]) -> str:
    return re.sub(r"\$\{(.+?)\}", lambda match: str(_lookup(match[1], scope)), text)


def _lookup(dotted: str, scope: Mapping[str, Any]) -> Any:
    value: Any = scope
    for part in dotted.split("."):
        value = value[part]
    return value


def _path(out: str | dict[str, Any]) -> str:
    return out if isinstance(out, str) else next(iter(out))
