"""Everything that temper refuses or cannot do, as one tree.

    TemperError                  exit 1    a fault; retried as the table in tasks/orchestration/prefect_tasks.py says
    |-- BadInput                 exit 65   what the user gave cannot be used; never retried
    |   |-- BadParams                      params.yaml, or a command-line argument
    |   |-- BadData                        a file of rows
    |   |-- BadModel                       a model folder, an adapter or a tokenizer
    |   |-- Diverged                       a loss or gradient that is not finite
    |   |-- NotEquivalent                  a merged model that is not the model that was trained
    |   |-- GateRefused                    a promotion without the evidence for it
    |   `-- OutOfMemory      exit 71       more memory is needed than there is
    `-- Transient                exit 75   may go well the next time; retried
        |-- Interrupted                    stopped by a signal, after saving what was done
        |-- InputsChanged                  an input was edited while the stage ran
        |-- WorkspaceBusy                  another run holds the workspace
        |-- AliasMoved                     somebody else moved the champion alias first
        `-- RegistryUnreachable            MLflow does not answer

The exit codes are those of sysexits.h: 65 is EX_DATAERR, 71 is EX_OSERR, 75 is EX_TEMPFAIL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, begins a line, turns the direction of text, or cannot be printed."""


def in_one_line(text: str) -> str:
    """Escape the control characters of a text that anybody may have written, such as the name of a file."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _in_lines(text: str, indent: str) -> str:
    """Escape control characters in each line, and indent what follows the first, so that none looks like our own."""
    return f"\n{indent}".join(in_one_line(line) for line in text.split("\n"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest known name after "unknown NAME", if one is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


class TemperError(Exception):
    """An error that a user can act on.

    Args:
        what: what went wrong, in one sentence.
        where: file, line, row or key, as precisely as it is known.
        got: what was found there.
        expected: what would have been right.
        fix: what to do next.
        examples: further places of the same kind; `examples_shown` of them are shown, the rest is counted.
    """

    exit_code = 1
    examples_shown = 5

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        got: str = "",
        expected: str = "",
        fix: str = "",
        examples: Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        self.examples = tuple(examples)

    def line(self) -> str:
        """Format the error in one line, as an example among others."""
        return in_one_line(f"{self.where}: {self.what}" + (f" (got {self.got})" if self.got else ""))

    def __str__(self) -> str:
        """Format the error as one readable block, without a traceback."""
        lines = [in_one_line(f"{self.where}: ") + self.what if self.where else self.what]
        lines += [f"  - {_in_lines(example, '    ')}" for example in self.examples[: self.examples_shown]]
        if len(self.examples) > self.examples_shown:
            lines.append(f"  and {len(self.examples) - self.examples_shown} more")
        labelled = (("got", self.got), ("expected", self.expected), ("to fix", self.fix))
        lines += [f"  {label + ':':<9} {_in_lines(text, ' ' * 12)}" for label, text in labelled if text]
        return "\n".join(lines)


class BadInput(TemperError):
    """Unusable input from the user; trying again changes nothing."""

    exit_code = 65


class BadParams(BadInput):
    """params.yaml or a command-line argument is wrong."""

    examples_shown = 25  # they are in one file, and are corrected together


class BadData(BadInput):
    """A file of rows is wrong."""


class BadModel(BadInput):
    """A model folder, an adapter or a tokenizer is wrong."""


class Diverged(BadInput):
    """A loss or a gradient is not finite."""


class NotEquivalent(BadInput):
    """A merged model is not the model that was trained."""


class GateRefused(BadInput):
    """A promotion without the evidence for it."""


class OutOfMemory(BadInput):
    """More memory is needed than there is; with the same settings it will be so again."""

    exit_code = 71


class Transient(TemperError):
    """May go well the next time."""

    exit_code = 75


class Interrupted(Transient):
    """Stopped by a signal, after saving what was done."""


class InputsChanged(Transient):
    """An input was edited while the stage ran."""


class WorkspaceBusy(Transient):
    """Another run holds the workspace."""


class AliasMoved(Transient):
    """Somebody else moved the champion alias first."""


class RegistryUnreachable(Transient):
    """MLflow does not answer."""
