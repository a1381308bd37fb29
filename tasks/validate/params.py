"""Params of validation: actions on rows in which a check finds something."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue, StringConstraints, field_validator, model_validator

from tasks.core.params import Count, HeldOut, Name, Positive, Section, Share


class Check(Section):
    """Action on rows in which a check finds something."""

    action: Literal["reject", "warn", "ignore"] = "reject"
    """To quarantine; counted in the report; or not looked at in the report either."""
    mostly: Share = 0.9
    """The share of rows that must pass; below it the stage fails, or with `warn` the report says so."""


class RepairableCheck(Section):
    """Action on rows in which a check finds something that can be repaired."""

    action: Literal["reject", "repair", "warn", "ignore"] = "reject"
    """To quarantine; repaired, with a record of each change; counted in the report; or not looked at."""
    mostly: Share = 0.9
    """The share of rows that must pass; below it the stage fails, or with `warn` the report says so."""


class Checks(Section):
    """Checks of every row; tasks/validate/row_features.py says how each is computed."""

    roles: Check = Check(action="reject", mostly=0.9)
    """Turns out of order: an optional system turn, then user and assistant in turn, calls before tools' results."""
    turns: Check = Check(action="reject", mostly=0.9)
    """More turns than `max_turns`."""
    characters: Check = Check(action="reject", mostly=0.9)
    """No characters, or more than `max_characters`."""
    blank_turns: Check = Check(action="reject", mostly=0.9)
    """A turn that says nothing."""
    outer_space: RepairableCheck = RepairableCheck(action="warn", mostly=0.0)
    """White space at an end of a text; repaired by taking it off."""
    control_tokens: Check = Check(action="reject", mostly=0.9)
    """What looks like a control token of a chat template, such as <|im_end|>."""
    template_text: Check = Check(action="warn", mostly=0.99)
    """A prompt template that is already in the text, such as `### Instruction:`."""
    placeholders: Check = Check(action="reject", mostly=0.9)
    """An unfilled `{{name}}`."""
    html: Check = Check(action="warn", mostly=0.95)
    """Tags and entities of HTML."""
    replacement_characters: Check = Check(action="reject", mostly=0.9)
    """U+FFFD, left by a wrong decoding."""
    mojibake: RepairableCheck = RepairableCheck(action="warn", mostly=0.99)
    """UTF-8 read as Latin-1; repaired by ftfy."""
    control_characters: RepairableCheck = RepairableCheck(action="repair", mostly=0.9)
    """Characters below U+0020 but tab and line ends; repaired by taking them out."""
    unicode_normalization: RepairableCheck = RepairableCheck(action="repair", mostly=0.9)
    """Letters not in Unicode's composed form; repaired to NFC."""
    refusals: Check = Check(action="warn", mostly=0.95)
    """A reply that begins by declining, in English or Chinese."""
    language_mismatch: Check = Check(action="warn", mostly=0.95)
    """A reply in another script than its question."""
    length_outliers: Check = Check(action="warn", mostly=0.99)
    """A length further from its kind's median than `outlier_deviations`."""
    emails: RepairableCheck = RepairableCheck(action="warn", mostly=0.95)
    """E-mail addresses; repaired to [email]."""
    phone_numbers: RepairableCheck = RepairableCheck(action="warn", mostly=0.95)
    """Telephone numbers; repaired to [phone_number]."""
    secrets: RepairableCheck = RepairableCheck(action="reject", mostly=0.9)
    """Secret keys of well-known services; repaired to [secret]."""
    same_replies: Check = Check(action="reject", mostly=0.9)
    """Chosen and rejected that are the same."""
    prefix_replies: Check = Check(action="warn", mostly=0.99)
    """Chosen and rejected of which one begins with the other."""
    contradictions: Check = Check(action="reject", mostly=0.9)
    """The same reply labelled good and bad, or a pair that stands the other way round elsewhere."""
    contamination: Check = Check(action="reject", mostly=0.9)
    """A question of a benchmark or of the held-out rows, whole or by `contamination_ngram` words in a row."""


class Duplicates(Section):
    """Rows that say the same, across all sources."""

    exact: Literal["drop", "warn", "ignore"] = "drop"
    """The same words, whatever case, width and punctuation."""
    near: Literal["drop", "warn", "ignore"] = "ignore"
    """Nearly the same words. Where they are looked for, near-equal prompts are one group of the split."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """The least share of runs of three words that near duplicates have in common (Jaccard index)."""
    permutations: Count = 128
    """Hashes in a MinHash sketch; a multiple of `bands`."""
    bands: Count = 16
    """Groups of hashes, of which one must agree before two rows are compared."""
    keep: Literal["first", "longest"] = "first"
    """Which one stays."""

    @model_validator(mode="after")
    def _bands_fit(self) -> Duplicates:
        if self.permutations % self.bands:
            raise ValueError("permutations must be a multiple of bands")
        return self


class Expectation(Section):
    """An expectation of Great Expectations; whatever other keys it has are that expectation's own arguments."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    type: Annotated[str, StringConstraints(pattern=r"^\w+$")]
    """Its name in Great Expectations, such as `expect_column_values_to_not_match_regex`."""
    action: Literal["reject", "warn"] = "reject"
    """To quarantine, or counted in the report. A whole column has no rows, so `reject` fails the stage."""
    mostly: Share | None = None
    """The share of rows that must pass; below it the stage fails, or with `warn` the report says so. Where it is left
    out, the report holds it to be 1, and rows that fail go to quarantine, within `max_quarantined`."""

    @property
    def arguments(self) -> dict[str, JsonValue]:
        """Return the arguments of the expectation, without `mostly`."""
        return dict(self.__pydantic_extra__)


class Split(HeldOut):
    """The part of `render` that is read here: rows that will be held out are looked for among those to learn from."""

    model_config = ConfigDict(extra="ignore")


class Validate(Section):
    """Rules that a row must meet, and how many may fail."""

    max_quarantined: Share = 0.05
    """The stage fails when a larger share of all rows goes to quarantine."""
    max_turns: Count = 64
    """Messages in a row."""
    max_characters: Count = 40000
    """Characters in a row, over all its messages."""
    outlier_deviations: Positive = 6.0
    """How many robust standard deviations of the logarithm of its length make a row an outlier."""
    contamination_ngram: Annotated[int, Field(ge=5)] = 13
    """Words in a row, shared with a question, that count as one (13 in arXiv:2005.14165)."""
    checks: Checks = Checks()
    """Each with what is done about it."""
    duplicates: Duplicates = Duplicates()
    """How they are told, and which one stays."""
    expectations: dict[Name, Expectation] = {}
    """Expectations of your own, by a name that reports give them; docs/data.md has the columns."""
    expectation_suites: list[Name] = []
    """Suites of Great Expectations in data/expectations/, as NAME.json, whose expectations are added."""
    accepted: list[Name] = []
    """Sources whose rows a person has looked at, as those that are released from quarantine: what checks and
    expectations find there is counted, and rejects no row; but for contamination, and ids that are not unique."""

    @field_validator("expectations")
    @classmethod
    def _other_than_built_in(cls, expectations: dict[str, Expectation]) -> dict[str, Expectation]:
        taken = {"ids", "exact_duplicates", "near_duplicates", *Checks.model_fields}
        if same := sorted(taken & expectations.keys()):
            raise ValueError(f"{same[0]} is the name of a check that there is already: call the expectation otherwise")
        return expectations
