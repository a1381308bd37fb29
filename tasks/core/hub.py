"""Models and datasets of the Hugging Face hub, at a pinned revision: from the local cache, or fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tasks.core.errors import BadInput, Transient


def snapshot(name: str, revision: str, patterns: Sequence[str], *, kind: Literal["model", "dataset"]) -> Path:
    """Return the folder of a repository at its pinned revision; it is fetched unless HF_HUB_OFFLINE is set.

    Args:
        name: owner/name.
        revision: the whole hash of a commit.
        patterns: the files that are wanted, as globs.
        kind: what the repository holds.

    Raises:
        BadInput: the hub has no such repository or revision.
        Transient: it is not cached and the hub does not answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{name}@{revision}"
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(patterns)))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BadInput(f"the hub has no such {kind} or revision", where=where, got=str(error).split("\n")[0]) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise Transient(
            "is not in the local hub cache and cannot be fetched",
            where=where,
            got=str(error).split("\n")[0],
            fix="check the network, or fetch it where there is one and copy the hub cache here",
        ) from error
