"""The suites of `evaluate.suites`: what a model is asked besides the held-out rows, told apart by `kind`.

The same sections, without `limit` and `chat_template`, are the parts of the ready suites in data/suites/.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from tasks.core.errors import did_you_mean
from tasks.core.layout import CLONE
from tasks.core.params import Commit, Count, FilePath, HubName, Name, Section
from tasks.readers.numbered_answers import NumberedFrom

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Limit: TypeAlias = Count | Literal["none"]
ShownText = Annotated[str, StringConstraints(max_length=20_000)]
FieldName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


SHIPPED_SUITES = CLONE / "data" / "suites"


def shipped_names() -> list[str]:
    """List the names of the ready suites."""
    return sorted(file.stem for file in SHIPPED_SUITES.glob("*.yaml"))


def shipped_name(name: str) -> str:
    """Check that a name is that of a ready suite, and return it.

    Raises:
        ValueError: it is not.
    """
    known = shipped_names()
    if name not in known:
        meant = did_you_mean(name, known) or "."
        raise ValueError(f'no suite "{name}" is shipped{meant} There are: {", ".join(known)}')
    return name


# --- metrics ----------------------------------------------------------------------------------------------------------


class Choice(Section):
    """Multiple choice: the likeliest ending is the model's answer."""

    name: Literal["choice"]
    endings: Literal["letters", "texts", "contexts"] = "texts"
    """letters: the prompt lists the choices and the model names one; texts: it goes on with one; contexts: the choices
    stand before one common ending, the column `target` (Winograd)."""
    normalise: Literal["none", "characters", "tokens"] = "characters"
    """What an ending's log-probability is divided by before they are compared."""


class LikelihoodMetric(Section):
    """Likelihood of the right continuation, the column `answer`."""

    name: Literal["loglikelihood"]
    score: Literal["logp", "greedy"] = "logp"
    """logp: nats per token; greedy: 1 where the model would write it by itself."""


class AnswerPattern(Section):
    """Pattern that is cut out of a text."""

    regex: str
    """The last match in the text; its first group, if it has one."""

    @field_validator("regex")
    @classmethod
    def _compiles(cls, regex: str) -> str:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return regex


Extract: TypeAlias = Literal["whole", "first_line", "last_number", "first_letter"] | AnswerPattern


class Generate(Section):
    """The model writes; the answer is cut out of it and compared with the column `answer`, the best of several."""

    name: Literal["generate"]
    extract: Extract = "whole"
    """What of the text is the model's answer."""
    target: Extract = "whole"
    """What of the column is the right answer."""
    match: Literal["exact", "normalised", "numeric", "bleu", "chrf", "rouge1", "rouge2", "rougeL"] = "exact"
    """normalised: without case, punctuation and articles; numeric: the same number, however it is written."""
    stop: list[str] = []
    """Texts that end the answer, besides the model's stop token."""


class Preference(Section):
    """Preference of the column `chosen`: whether it is likelier than `rejected`."""

    name: Literal["preference"]
    normalise: Literal["none", "tokens"] = "none"
    """Whether log-probabilities are divided by tokens before they are compared."""


class PerplexityMetric(Section):
    """Perplexity of the column `text`, in nats per token."""

    name: Literal["perplexity"]


Metric: TypeAlias = Annotated[
    Choice | LikelihoodMetric | Generate | Preference | PerplexityMetric, Field(discriminator="name")
]

SUITE_COLUMNS: dict[str, frozenset[str]] = {
    "choice": frozenset({"choices", "answer"}),
    "loglikelihood": frozenset({"answer"}),
    "generate": frozenset({"answer"}),
    "preference": frozenset({"chosen", "rejected"}),
    "perplexity": frozenset({"text"}),
}
"""What rows must have for each metric."""


# --- rows of one's own ------------------------------------------------------------------------------------------------


class Shots(Section):
    """Solved questions that stand before each question."""

    count: Count = 5
    """How many; the first ones of the file."""
    path: FilePath
    """A file, archive or folder, with the same columns."""
    files: str = "*"
    """Which of its files, as in the suite's own `files`; `*` stands for the same task."""
    sha256: Digest | Literal["none"] = "none"
    """Of the file; of a folder, over those of its files. With `none` a change of it goes unnoticed."""


class RowsPart(Section):
    """Questions of row files."""

    kind: Literal["rows"]
    path: FilePath
    """A file of rows, an archive or a folder, in any format that ingest reads."""
    sha256: Digest | Literal["none"] = "none"
    """Of the file; of a folder, over those of its files. With `none` a change of it goes unnoticed."""
    files: str = "*"
    """Which files of an archive or folder: a path in it, where one `*` may stand for a part of a name."""
    task: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    """What the questions are reported as; `*` stands for what it stands for in `files`."""
    columns: dict[FieldName, str | list[str]]
    """What a question is made of, each out of one column or of several: `answer`, `choices`, `chosen`, `rejected`,
    `text` and `target` mean what the metric says, `id` is the question's own; others are for the prompt."""
    prompt: ShownText
    """A Jinja template over those names, and `letters`."""
    delimiter: Annotated[str, StringConstraints(max_length=8)] = " "
    """What stands between a prompt and its ending; nothing where the chat template is used."""
    metric: Metric
    """What is asked, and how it is scored."""
    numbered_from: NumberedFrom = "auto"
    """The number of the first choice, where answers are numbers: 0, 1, or what all answers of the files tell."""
    shots: Shots | Literal["none"] = "none"
    """Solved questions that stand before each question."""
    max_new_tokens: Count = 256
    """Tokens in an answer, at most, where the model writes one."""

    @model_validator(mode="after")
    def _has_columns(self) -> RowsPart:
        needed = SUITE_COLUMNS[self.metric.name]
        if isinstance(self.metric, Choice) and self.metric.endings == "contexts":
            needed = needed | {"target"}
        if missing := sorted(needed - self.columns.keys()):
            raise ValueError(f"the metric {self.metric.name} needs columns.{', columns.'.join(missing)}")
        if self.files.count("*") > 1 or ("*" in self.task and "*" not in self.files):
            raise ValueError("one `*` at most in files; in task only where files has one")
        return self


# --- tasks of lm-eval -------------------------------------------------------------------------------------------------


class HubData(Section):
    """Datasets of the Hugging Face hub."""

    kind: Literal["hub"]
    revisions: dict[HubName, Commit]
    """The commit of each of `datasets`."""


class MirrorData(Section):
    """Datasets that lie on this disk."""

    kind: Literal["mirror"]
    path: FilePath
    """A folder that holds each of `datasets` as OWNER/NAME."""


class HarnessPart(Section):
    """Tasks that lm-eval ships."""

    kind: Literal["harness"]
    tasks: Annotated[list[str], Field(min_length=1)]
    """Their names in lm-eval; of groups, too."""
    datasets: list[HubName] = []
    """Datasets of the hub that they read."""
    metric: str = "acc"
    """Which of their metrics is the score: NAME, or NAME,FILTER."""
    shots: Annotated[int, Field(ge=0)] | Literal["own"] = "own"
    """Solved questions before each question; own: as many as the task says."""


class _Asked(Section):
    limit: Limit = "none"
    """Questions of each task, at most; or none."""
    chat_template: bool = True
    """Whether questions are put through the model's own chat template, solved ones as earlier turns."""


class RowsSuite(RowsPart, _Asked):
    """Questions of row files of one's own."""


class HarnessSuite(HarnessPart, _Asked):
    """Tasks that lm-eval ships."""

    data: Annotated[HubData | MirrorData, Field(discriminator="kind")]
    """Where their datasets come from."""


class TaskFileSuite(_Asked):
    """A task of one's own in lm-eval's form: a YAML file, read as data; its templates run in a sandbox."""

    kind: Literal["task_file"]
    path: FilePath
    """The YAML file; the files of rows that it names lie beside it, or below."""
    sha256: Digest | Literal["none"] = "none"
    """Of the YAML file. With `none` a change of it goes unnoticed."""
    metric: str = "acc"
    """Which of its metrics is the score: NAME, or NAME,FILTER."""
    shots: Annotated[int, Field(ge=0)] | Literal["own"] = "own"
    """Solved questions before each question; own: as many as the file says."""


class ReadySuite(_Asked):
    """A suite that temper ships, in data/suites/."""

    kind: Literal["ready"]
    name: Annotated[Name, AfterValidator(shipped_name)]
    """Its name there."""
    data: FilePath
    """The folder with its files, laid out as the suite's own file says."""
    missing: Literal["refuse", "skip"] = "refuse"
    """What to do where the folder lacks some of them; what is skipped is said in the report."""


Suite: TypeAlias = Annotated[HarnessSuite | TaskFileSuite | RowsSuite | ReadySuite, Field(discriminator="kind")]
SuitePart: TypeAlias = Annotated[HarnessPart | RowsPart, Field(discriminator="kind")]


class Ready(Section):
    """A file of data/suites/."""

    about: str
    """What the suite asks, in a sentence."""
    source: str
    """Where it comes from: paper and repository."""
    licence: str = "unknown"
    """Of its data."""
    parts: Annotated[list[SuitePart], Field(min_length=1)]
    """Its tasks."""


class GeneralText(Section):
    """A text that has nothing to do with the training."""

    path: FilePath
    """A file of rows with a column `text`, or of plain text."""
    sha256: Digest | Literal["none"] = "none"
    """Of the file. With `none` a change of it goes unnoticed."""
    max_tokens: Count = 20000
    """So many of its first tokens are read."""
