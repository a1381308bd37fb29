"""`params.yaml`, typed: every knob of the factory, one section per stage, and no defaults in Python.

A section is a frozen class; a key that is not a field is refused with the nearest known name. All errors of a file are
reported at once, each with its line and its dotted path.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from tasks.adapter_params import AdaloraAdapter, AnyAdapter, FullAdapter
from tasks.base_params import AnyBase
from tasks.evaluate_params import HELD_OUT, Evaluate
from tasks.fields import Commit, Count, FilePath, HubName, Name, NotNegative, Positive, Section, Seed, Share
from tasks.merge_params import Merge
from tasks.names import method_alias
from tasks.objective_params import AnyObjective, KtoObjective, ReferringObjective
from tasks.registry_params import Promote, Register

REMOTE = "data/remote.md"


# --- ingest -----------------------------------------------------------------------------------------------------------


class AnySource(Section):
    """What every source says of itself."""

    path: FilePath
    """What DVC watches: a file or folder, relative to the workspace or absolute."""
    use: Literal["train", "benchmark"]
    """Rows to learn from, or questions of a benchmark that no row to learn from may contain."""
    licence: Annotated[str, StringConstraints(min_length=1)]
    """What the rows may be used for, as an SPDX name; noted in the manifest."""


class GeneratorSource(AnySource):
    """Rows made from a seed by tasks/generate.py; `path` is the lexicon, a YAML file of the words it draws from."""

    kind: Literal["generator"]
    rows: Literal["chat", "preference", "text", "talk"]
    """Chats, preference pairs, plain text of facts, or small talk as plain text."""
    count: Count
    """Rows to make."""
    seed: Seed
    """The same seed, count and lexicon give the same rows."""
    withheld: Share
    """Facts in this share of the hash range are never drawn; at least `render.held_out` keeps held-out facts unseen."""


Format = Literal[
    "auto",
    "conversations",
    "alpaca",
    "seed_tasks",
    "prompt_reply",
    "choices",
    "preference",
    "ranked",
    "labelled",
    "text",
    "pair",
]
Field_ = Literal["prompt", "reply", "system", "chosen", "rejected", "label", "text", "input", "target"]


class First(Section):
    """The beginning of a source."""

    first: Count
    """So many rows."""


class Shuffled(Section):
    """Rows from anywhere in a source."""

    shuffled: Count
    """So many rows, the first of a random order."""
    seed: Seed
    """Of that order."""


class RowsOfFiles(AnySource):
    """How files of rows are read."""

    format: Format | Annotated[dict[Field_, str], Field(min_length=1)]
    """How rows are written; `auto` looks at the first of each file; or which column is what: {prompt: Q, reply: A}."""
    encoding: Literal["utf-8", "latin-1", "cp1252", "mac-roman", "gb18030", "big5", "shift-jis", "euc-jp", "euc-kr"]
    """Of text files."""
    max_refused: Share
    """The stage fails when a larger share of the rows is malformed; the others are listed in refused.parquet."""
    take: Literal["all"] | First | Shuffled
    """Which rows: `all`, {first: 10000}, or {shuffled: 1000, seed: 42}, as `datasets` shuffles them."""


class FileSource(RowsOfFiles):
    """Rows of one file: json, jsonl, csv, tsv, parquet, arrow or txt, also packed as gz, zst or zip."""

    kind: Literal["file"]


class FolderSource(RowsOfFiles):
    """Rows of the files of a folder."""

    kind: Literal["folder"]
    glob: Annotated[str, StringConstraints(min_length=1)]
    """Which files, such as `*.jsonl` or `**/*.parquet`."""


class RemoteSource(RowsOfFiles):
    """Rows of one file elsewhere, pinned to its content."""

    kind: Literal["remote"]
    path: Literal["data/remote.md"]
    """Stands in for what is not on this disk: a DVC dependency cannot be left out."""
    url: Annotated[str, StringConstraints(pattern=r"^(https|s3|gs|gcs|az|abfs|abfss)://[^\s@]+$")]
    """Where it is; object stores need the library of fsspec that knows them, and its environment variables."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole file; anything else is refused."""
    max_bytes: Count
    """A larger file is refused while it comes."""


class HubSource(RowsOfFiles):
    """Rows of the files of a dataset of the Hugging Face hub, pinned to a commit."""

    kind: Literal["hub"]
    path: Literal["data/remote.md"]
    """Stands in for what is not on this disk: a DVC dependency cannot be left out."""
    id: HubName
    """Owner and name."""
    revision: Commit
    """The whole commit hash; branches and tags move and are refused."""
    glob: Annotated[str, StringConstraints(min_length=1)]
    """Which files, such as `data/train-*.parquet`."""


Source = Annotated[GeneratorSource | FileSource | FolderSource | RemoteSource | HubSource, Field(discriminator="kind")]


class Ingest(Section):
    """Where the rows come from; one DVC stage `ingest@NAME` for each source."""

    sources: Annotated[dict[Name, Source], Field(min_length=1)]


# --- validate, render -------------------------------------------------------------------------------------------


class Check(Section):
    """What becomes of rows in which a check finds something."""

    action: Literal["reject", "warn", "ignore"]
    """To quarantine; counted in the report; or not looked at in the report either."""
    mostly: Share
    """The share of rows that must pass; below it the stage fails, or with `warn` the report says so."""


class RepairableCheck(Section):
    """What becomes of rows in which a check finds something that can be repaired."""

    action: Literal["reject", "repair", "warn", "ignore"]
    """To quarantine; repaired, with a record of each change; counted in the report; or not looked at."""
    mostly: Share
    """The share of rows that must pass; below it the stage fails, or with `warn` the report says so."""


class Checks(Section):
    """What is looked for in every row; tasks/checks/facts.py says how each is told."""

    roles: Check
    """Turns out of order: an optional system turn, then user and assistant in turn, calls before tools' results."""
    turns: Check
    """More turns than `max_turns`."""
    characters: Check
    """No characters, or more than `max_characters`."""
    blank_turns: Check
    """A turn that says nothing."""
    outer_space: RepairableCheck
    """White space at an end of a text; repaired by taking it off."""
    control_tokens: Check
    """What looks like a control token of a chat template, such as <|im_end|>."""
    template_text: Check
    """A prompt template that is already in the text, such as `### Instruction:`."""
    placeholders: Check
    """An unfilled `{{name}}`."""
    html: Check
    """Tags and entities of HTML."""
    replacement_characters: Check
    """U+FFFD, left by a wrong decoding."""
    mojibake: RepairableCheck
    """UTF-8 read as Latin-1; repaired by ftfy."""
    control_characters: RepairableCheck
    """Characters below U+0020 but tab and line ends; repaired by taking them out."""
    unnormalised: RepairableCheck
    """Letters not in Unicode's composed form; repaired to NFC."""
    refusals: Check
    """A reply that begins by declining, in English or Chinese."""
    language_mismatch: Check
    """A reply in another script than its question."""
    length_outliers: Check
    """A length further from its kind's median than `outlier_deviations`."""
    emails: RepairableCheck
    """E-mail addresses; repaired to [email]."""
    telephones: RepairableCheck
    """Telephone numbers; repaired to [telephone]."""
    keys: RepairableCheck
    """Secret keys of well-known services; repaired to [key]."""
    same_replies: Check
    """Chosen and rejected that are the same."""
    prefix_replies: Check
    """Chosen and rejected of which one begins with the other."""
    contradictions: Check
    """The same reply labelled good and bad, or a pair that stands the other way round elsewhere."""
    leaks: Check
    """A question of a benchmark or of the held-out rows, whole or by `leak_words` words in a row."""


class Duplicates(Section):
    """Rows that say the same, across all sources."""

    exact: Literal["merge", "warn", "ignore"]
    """The same words, whatever case, width and punctuation."""
    near: Literal["merge", "warn", "ignore"]
    """Nearly the same words."""
    similarity: Annotated[float, Field(gt=0, le=1)]
    """The least share of runs of three words that near duplicates have in common (Jaccard index)."""
    permutations: Count
    """Hashes in a MinHash sketch; a multiple of `bands`."""
    bands: Count
    """Groups of hashes, of which one must agree before two rows are compared."""
    keep: Literal["first", "longest"]
    """Which one stays."""

    @model_validator(mode="after")
    def _bands_fit(self) -> Duplicates:
        if self.permutations % self.bands:
            raise ValueError("permutations must be a multiple of bands")
        return self


class Validate(Section):
    """What a row must be, and how many may fail."""

    max_quarantined: Share
    """The stage fails when a larger share of all rows goes to quarantine."""
    max_turns: Count
    """Messages in a row."""
    max_characters: Count
    """Characters in a row, over all its messages."""
    outlier_deviations: Positive
    """How many robust standard deviations of the logarithm of its length make a row an outlier."""
    leak_words: Annotated[int, Field(ge=5)]
    """Words in a row, shared with a question, that make a leak (13 in arXiv:2005.14165)."""
    checks: Checks
    """Each with what is done about it."""
    duplicates: Duplicates
    """How they are told, and which one stays."""


class Render(Section):
    """From rows to token ids, loss masks and the split."""

    held_out: Share
    """The share of groups that is kept for evaluation; which ones is a fixed function of their names."""
    max_tokens: Count
    """Tokens in a rendered row."""
    too_long: Literal["truncate", "drop", "refuse"]
    """What becomes of a longer one: cut at the end, left out, or the stage fails; all are counted."""
    loss_on: Literal["all", "last"]
    """Which of the assistant's turns are learnt: all, or only the last. Templates that rewrite earlier turns, such as
    Qwen3's, need `last`."""


# --- train: one method per key, each an adapter x an objective --------------------------------------------------------


OptimizerName = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "adamw_schedule_free"
]


class WarmupStableDecay(Section):
    """The peak until the last steps, and from there to zero (arXiv:2405.18392)."""

    wsd: Annotated[float, Field(gt=0, le=1)]
    """The share of all steps in which the rate goes down, by 1 - sqrt; 0.2 in section 3 of the paper."""


class Evaluation(Section):
    """The loss on held-out rows in the course of a training, and what follows from it."""

    every_steps: Count
    """How often it is computed; and after the last step."""
    patience: Literal["never"] | Count
    """The training stops after so many evaluations in a row that are no better than the best; or never early."""
    keep: Literal["last", "best"]
    """Which weights become the adapter: those of the last step, or those with the lowest held-out loss."""


class Samples(Section):
    """What the model replies to held-out prompts in the course of a training, greedily."""

    every_steps: Count
    """How often it is asked; and after the last step."""
    prompts: Count
    """How many prompts, the first of the held-out rows."""
    max_new_tokens: Count
    """Tokens in a reply, at most."""


class Method(Section):
    """A named pair of adapter and objective, and how it is optimised."""

    adapter: Annotated[AnyAdapter, Field(discriminator="name")]
    objective: Annotated[AnyObjective, Field(discriminator="name")]
    epochs: Count
    """Passes over the rows."""
    batch_rows: Count
    """Rows in a step."""
    micro_batch_rows: Count
    """Rows in a forward pass, of each process; a step adds up the gradients of as many passes as it takes."""
    optimizer: OptimizerName
    """AdamW or Lion; with states in 8 bits (`_8bit`), or that a GPU may move to the host (`paged_`); or AdamW that
    averages its steps instead of a schedule's decay (`_schedule_free`, arXiv:2405.15682)."""
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    """The peak, after warm-up; AdamW moves every weight by about so much a step."""
    schedule: Literal["constant", "linear", "cosine"] | WarmupStableDecay
    """From the peak on; linear and cosine end at zero; so does {wsd: 0.2}, which goes down in the last fifth only."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps of linear warm-up."""
    weight_decay: NotNegative
    """Decoupled (AdamW); never on rotations."""
    max_grad_norm: Positive
    """The gradient is scaled down to this norm."""
    checkpoint_every_steps: Count
    """What a kill loses at most."""
    evaluation: Literal["none"] | Evaluation
    """The loss on held-out rows on the way: to stop early, or to keep the best weights."""
    samples: Literal["none"] | Samples
    """Replies to held-out prompts on the way."""
    fit_memory: bool
    """Whether a training may make do with less memory: if by its estimate it would not fit, activations are computed
    again in the backward pass; a step that still runs out of memory is taken again with half of `micro_batch_rows`. The
    gradients are the same. One process can do that, several cannot."""
    report_to: list[Literal["tensorboard", "wandb"]]
    """Where the log goes besides MLflow; each needs its package. TensorBoard's files are in .temper/tensorboard."""
    seed: Seed
    """Of the adapter's initial weights, the order of rows, and dropout."""

    @model_validator(mode="after")
    def _passes_fit(self) -> Method:
        if self.micro_batch_rows > self.batch_rows:
            raise ValueError("micro_batch_rows must be at most batch_rows")
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Method:
        if isinstance(self.objective, KtoObjective) and self.batch_rows < 2:
            raise ValueError("kto compares each reply with those of other rows: batch_rows must be at least 2")
        switches = isinstance(self.objective, ReferringObjective) and self.objective.reference == "adapter_off"
        if switches and isinstance(self.adapter, FullAdapter):
            raise ValueError("full has no adapter to switch off: objective.reference must be precomputed")
        return self

    @model_validator(mode="after")
    def _rules_fit(self) -> Method:
        if self.optimizer == "adamw_schedule_free" and self.schedule != "constant":
            raise ValueError("adamw_schedule_free stands for a schedule: it needs `schedule: constant`")
        ends_early = isinstance(self.evaluation, Evaluation) and self.evaluation.patience != "never"
        keeps_best = isinstance(self.evaluation, Evaluation) and self.evaluation.keep == "best"
        if isinstance(self.adapter, AdaloraAdapter) and (ends_early or keeps_best):
            raise ValueError(
                "adalora takes ranks away until its last step: it needs `patience: never` and `keep: last`"
            )
        return self


def _method_name(name: str) -> str:
    if name == "base":
        raise ValueError('"base" names the untouched model in every report: call the method otherwise')
    return method_alias(name)


MethodName = Annotated[Name, AfterValidator(_method_name)]


class Params(Section):
    """The whole of params.yaml."""

    ingest: Ingest
    validate_: Annotated[Validate, Field(alias="validate")]
    base: Annotated[AnyBase, Field(discriminator="kind")]
    render: Render
    train: Annotated[dict[MethodName, Method], Field(min_length=1)]
    merge: Merge
    evaluate: Evaluate
    register_: Annotated[Register, Field(alias="register")]
    promote: Promote

    def unasked_suites(self) -> list[tuple[str, ...]]:
        """Where `promote` names a suite that no model is asked, as paths of keys; the last is the name."""
        asked = {HELD_OUT, *self.evaluate.suites}
        named = [("promote", "suite", self.promote.suite)]
        named += [("promote", "floors", suite) for suite in self.promote.floors]
        named += [("promote", "guarded", suite) for suite in self.promote.guarded]
        return [place for place in named if place[-1] not in asked]
