"""The ledger of the champion alias: who moved it, when, from which version to which, on what verdict, and why.

MLflow overwrites an alias and keeps no history. So a move is first an entry here, which nobody can change any more, and
then the alias is made to agree with the entries.

The ledger of a model is one MLflow run, alone in an experiment named for the model; entry 7 is its param `move.000007`.
MLflow never changes a param: of two writers of the same entry, on whatever machines, the database takes the first and
tells the other. That is compare-and-set: who decided on a ledger of six entries can write only the seventh. The
experiment's name is unique too, so the run is made in a draft of another name, which is then renamed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tasks.core.errors import AliasMoved, BadInput
from tasks.registry.local_reader import RegistryReader
from tasks.registry.names import CHAMPION

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REASON_CHARACTERS = 1000
"""A longer reason is cut: MLflow keeps 6,000 characters of a param, and an entry says more than the reason."""

_MOVE = "move."
_TAG = "temper.move."
"""What the tags of the registered model begin with that were the ledger of earlier versions of temper."""


class Move(NamedTuple):
    """One move of the champion alias.

    Attributes:
        number: of the entry, from 1.
        action: `promote`, which puts `to` on top of the stack of champions, `rollback`, which takes those above off, or
            `refuse`, which moves nothing: somebody decided that `to` is not to be champion.
        before: the version that was champion; empty for the first.
        to: the version that is champion since, or that was refused.
        at: when, as ISO 8601 with the offset from UTC.
        by: who decided: the user's name on their machine, or that of their key on the pages.
        reason: as the user gave it.
        verdict: the SHA-256 of the gate's verdict; empty for a rollback.
        summary: the verdict in a few words.
        mark: random, so that its writer knows the entry again.
    """

    number: int
    action: str
    before: str
    to: str
    at: str
    by: str
    reason: str = ""
    verdict: str = ""
    summary: str = ""
    mark: str = ""


def moves(client: RegistryReader, model: str) -> list[Move]:
    """Read the ledger of a model, oldest move first.

    Raises:
        BadInput: the ledger was deleted, or lacks an entry.
    """
    run = _run_of(client, model)
    return _entries(run, model) if run else _tagged(client, model)


def champions(ledger: Sequence[Move]) -> list[str]:
    """Return the stack of champions after these moves: the last is the present one, a rollback returns to one below."""
    return _replayed(ledger)[0]


def withdrawn(ledger: Sequence[Move]) -> set[str]:
    """Return the versions that were rolled back or refused and that have not been made champion since."""
    return _replayed(ledger)[1]


def _replayed(ledger: Sequence[Move]) -> tuple[list[str], set[str]]:
    stack: list[str] = []
    gone: set[str] = set()
    for move in ledger:
        if move.action == "promote":
            stack.append(move.to)
        elif move.action == "refuse":
            gone.add(move.to)
            continue
        else:
            gone.add(stack.pop())
            while stack[-1] != move.to:
                gone.add(stack.pop())
        gone.discard(move.to)
    return stack, gone


def champion_of(client: RegistryReader, model: str) -> str | None:
    """Return the champion's version according to the ledger."""
    stack = champions(moves(client, model))
    return stack[-1] if stack else None


def move_champion(
    client: MlflowClient,
    model: str,
    seen: Sequence[Move],
    action: str,
    to: str,
    *,
    reason: str = "",
    verdict: str = "",
    summary: str = "",
    by: str = "",
) -> Move:
    """Write the next entry of the ledger, then make the alias agree with it.

    Args:
        client: of the registry.
        model: the registered model's name.
        seen: the ledger as it was when the move was decided.
        action: `promote`, `rollback` or `refuse`.
        to: the version that is champion afterwards, or that is refused.
        reason: the user's.
        verdict: the SHA-256 of the gate's verdict.
        summary: the verdict in a few words.
        by: who decided; without it the user of this process.

    Raises:
        AliasMoved: somebody else wrote an entry since.
    """
    import getpass
    from datetime import UTC, datetime

    from mlflow.exceptions import MlflowException

    before = (champions(seen) or [""])[-1]
    at = datetime.now(UTC).isoformat(timespec="seconds")
    said = one_line(reason)[:REASON_CHARACTERS]
    mark = uuid.uuid4().hex
    move = Move(len(seen) + 1, action, before, to, at, by or getpass.getuser(), said, verdict, summary, mark)
    run = _run_of(client, model) or _begin(client, model)
    try:
        client.log_param(run.info.run_id, _name(move.number), json.dumps(move._asdict(), ensure_ascii=False))
    except MlflowException:
        # taken, or no answer: the entry itself tells whose it is
        written = moves(client, model)
        if len(written) < move.number:
            raise
        if written[move.number - 1].mark != mark:
            raise _moved(model, before, written) from None
    settle_champion(client, model)
    return move


def settle_champion(client: MlflowClient, model: str) -> str | None:
    """Make the champion alias agree with the ledger, which a kill may have kept apart; return the version.

    Of writers that settle at once the last to set the alias reads the ledger again after that, and it agrees.

    Raises:
        BadInput: the champion was deleted from the registry.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    while version := champion_of(client, model):
        if str(client.get_registered_model(model).aliases.get(CHAMPION)) == version:
            return version
        try:
            client.set_registered_model_alias(model, CHAMPION, version)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            raise BadInput(
                f"version {version} is champion, but was deleted from the registry",
                where=model,
                fix="roll back to an earlier one with `temper rollback --to N`",
            ) from error
    return None


def one_line(text: str) -> str:
    """Return a text in one line without control characters."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _moved(model: str, before: str, written: Sequence[Move]) -> AliasMoved:
    now, by = (champions(written) or [""])[-1], written[-1].by
    whence = f"v{before}" if before else "no version"
    return AliasMoved(
        f"alias moved from {whence} to v{now} meanwhile" if now != before else "somebody else decided meanwhile",
        where=f"models:/{model}@{CHAMPION}",
        got=f"a {written[-1].action} by {by}, {written[-1].at}",
        fix="run it again: it is compared with the present champion then",
    )


# --- the run that is the ledger ---------------------------------------------------------------------------------------


def ledger_name(model: str) -> str:
    """Return the name of the experiment that holds a model's ledger."""
    return f"{model} ledger"


def _name(number: int) -> str:
    return f"{_MOVE}{number:06d}"


def _run_of(client: RegistryReader, model: str) -> Run | None:
    experiment = client.get_experiment_by_name(ledger_name(model))
    if experiment is None:
        return None
    found = client.search_runs([experiment.experiment_id], max_results=1)
    if experiment.lifecycle_stage != "active" or not found:
        raise BadInput(
            "the ledger of the champions was deleted in MLflow",
            where=ledger_name(model),
            fix=f"bring it back: mlflow experiments restore --experiment-id {experiment.experiment_id}, and its run",
        )
    return found[0]  # type: ignore[no-any-return]


def _entries(run: Run, model: str) -> list[Move]:
    kept = {name: value for name, value in run.data.params.items() if name.startswith(_MOVE)}
    if missing := [_name(number) for number in range(1, len(kept) + 1) if _name(number) not in kept]:
        raise BadInput("the ledger of the champions lacks entries", where=ledger_name(model), examples=missing)
    return [Move(**json.loads(kept[name])) for name in sorted(kept)]


def _begin(client: MlflowClient, model: str) -> Run:
    """Create the ledger, with the moves of an older one; where two create it at once, one of them wins."""
    from mlflow.exceptions import MlflowException

    about = f"Every move of the alias `{CHAMPION}` of {model}, an entry each; MLflow never changes a param."
    draft = client.create_experiment(
        f"{ledger_name(model)}, draft {uuid.uuid4().hex}", tags={"mlflow.note.content": about}
    )
    run = client.create_run(draft, run_name=ledger_name(model), tags={"mlflow.note.content": about})
    for move in _tagged(client, model):
        client.log_param(run.info.run_id, _name(move.number), json.dumps(move._asdict(), ensure_ascii=False))
    client.update_run(run.info.run_id, status="FINISHED")
    try:
        client.rename_experiment(draft, ledger_name(model))
    except MlflowException:  # the name is taken
        client.delete_experiment(draft)
    made = _run_of(client, model)
    if made is None:
        raise BadInput("the ledger of the champions cannot be made", where=ledger_name(model))
    return made


def _tagged(client: RegistryReader, model: str) -> list[Move]:
    """Read the moves that earlier versions of temper kept as tags of the registered model."""
    try:
        tags = client.get_registered_model(model).tags
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
            raise  # a server that does not answer is no empty ledger
        return []
    return sorted(Move(**json.loads(value)) for name, value in tags.items() if name.startswith(_TAG))
