"""Uploads an adapter or a model folder to the Hugging Face hub, as one commit that others can pin.

The token is the one of the hub's own client: HF_TOKEN, or what `hf auth login` stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tasks.adapters.files import CONFIG, PUBLISHED, read_adapter_config, read_weights
from tasks.adapters.package import FOLDER, base_in
from tasks.core.artifacts import check_manifest
from tasks.core.errors import BadInput, BadModel, BadParams, TemperError, Transient
from tasks.core.layout import EQUIVALENCE
from tasks.core.params import HUB_NAME
from tasks.models.loader import MODEL_FILES, model_files
from tasks.publish.model_card import CARD, card

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "run `hf auth login`, or set HF_TOKEN to a token that may write there"


class Pushed(NamedTuple):
    """Commit of the repository after a push, and whether this push made it."""

    commit: str
    changed: bool


def push(folder: Path, name: str, *, private: bool, message: str) -> Pushed:
    """Upload a folder; one that is there already changes nothing.

    What an earlier push left and this one does not write goes in the same commit: it would be read with this one.

    Args:
        folder: an adapter's in its published form, or a model folder.
        name: owner/name on the hub; the repository is made if there is none.
        private: a new repository is for its owner alone, and one that others can see is refused.
        message: the commit's.

    Raises:
        BadParams: the name is none.
        BadData: a file is not what the folder's manifest says.
        BadModel: the folder is neither, or not safe to publish.
        BadInput: the hub does not let this user write there.
        Transient: the hub does not answer.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if not re.fullmatch(HUB_NAME, name):
        raise BadParams("is no name on the hub", got=name, expected="OWNER/NAME")
    files = pushable(folder)
    added = [CommitOperationAdd(inner, path) for inner, path in sorted(files.items())]
    if CARD not in files:
        added.append(CommitOperationAdd(CARD, card(folder).encode()))
    if get_token() is None:
        raise BadInput("there is no token for the hub", where=name, fix=LOGIN)
    api = HfApi()
    with _told(name):
        api.create_repo(name, private=private or None, exist_ok=True)
        before = api.model_info(name)
        if private and not before.private:
            raise BadInput("is public already", where=name, fix="make it private on the hub, or leave --private out")
        removed = [CommitOperationDelete(inner) for inner in left_over(api.list_repo_files(name), files)]
        done = api.create_commit(name, [*added, *removed], commit_message=message)
    return Pushed(str(done.oid), done.oid != before.sha)


def pushable(folder: Path) -> dict[str, Path]:
    """List the files of an adapter or model folder to publish, by their names in the repository, after checks.

    Raises:
        BadData: a file is not what the folder's manifest says.
        BadModel: the folder is neither, not safe, torn, or holds numbers that are not finite.
    """
    if not folder.is_dir():
        raise BadModel("there is no such folder", where=str(folder), expected="an adapter or a model folder")
    check_manifest(folder)
    if (folder / CONFIG).is_file():
        return _adapter(folder)
    files = {path.name: path for path in model_files(base_in(folder))}
    files |= {path.name: path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    for path in files.values():
        if path.suffix == ".safetensors":
            _check_finite(path)
    if (folder / EQUIVALENCE).is_file():
        files.pop(CARD, None)  # it is the base's, which `merge` copies
    if (folder / FOLDER).is_dir():
        files |= {f"{FOLDER}/{name}": path for name, path in _adapter(folder / FOLDER).items()}
    return files


def left_over(there: Iterable[str], files: Iterable[str]) -> list[str]:
    """List a repository's files that pushes write and this one does not; what else its owner put there is kept.

    A card is always written anew, and a licence may be the owner's.
    """
    patterns = {*MODEL_FILES, *PUBLISHED} - {CARD, "LICENSE*"}
    beside = {*PUBLISHED, CARD, "LICENSE*"}

    def is_ours(path: str) -> bool:
        parent, _, name = path.rpartition("/")
        known = {"": patterns, FOLDER: beside}.get(parent, set())
        return any(fnmatchcase(name, pattern) for pattern in known)

    return sorted(path for path in set(there) - set(files) if is_ours(path))


def _adapter(folder: Path) -> dict[str, Path]:
    read_adapter_config(folder)
    read_weights(folder)
    wanted = [folder / name for name in (*PUBLISHED, CARD)] + sorted(folder.glob("LICENSE*"))
    return {path.name: path for path in wanted if path.is_file()}


def _check_finite(path: Path) -> None:
    """Check one tensor after the other for numbers that are not finite; a whole shard may be larger than memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # not a mapping
                tensor = shard.get_tensor(name)
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    raise BadModel("has values that are not finite; refused", where=str(path), examples=[name])
    except SafetensorError as error:
        raise BadModel("is torn, or no safetensors file", where=str(path), got=str(error)) from error


# --- what the hub answers ---------------------------------------------------------------------------------------------


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into one error that explains what to do."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(name, error) from error
    except (httpx2.HTTPError, OSError) as error:
        raise _unanswered(name, error) from error
    except RuntimeError as error:  # around what an upload of one file raised
        cause = error.__cause__
        raise (_refusal(name, cause) if isinstance(cause, HfHubHTTPError) else _unanswered(name, error)) from error
    except ValueError as error:
        raise BadInput("the hub refuses it", where=name, got=" ".join(str(error).split())) from error


def _refusal(name: str, error: HfHubHTTPError) -> TemperError:
    status, got = error.response.status_code, str(error).split("\n")[0]
    if status == 401:
        return BadInput("the hub does not know this token", where=name, got=got, fix=LOGIN)
    if status in (403, 404):
        return BadInput("no permission to push there", where=name, got=got, fix=LOGIN)
    if status in (408, 409, 412, 429) or status >= 500:
        return Transient("the hub is in trouble", where=name, got=got, fix="push again later")
    return BadInput("the hub refuses it", where=name, got=got)


def _unanswered(name: str, error: Exception) -> Transient:
    got = f"{type(error).__name__}: {error}".split("\n")[0]
    return Transient("the hub does not answer", where=name, got=got, fix="check the network, then push again")
