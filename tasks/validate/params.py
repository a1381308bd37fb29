"""What is done about rows in which a check finds something."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.core.params import Count, Positive, Section, Share


class Check(Section):
    """Action on rows in which a check finds something."""

    action: Literal["reject", "warn", "ignore"]
    """To quarantine; counted in the report; or not looked at in the report either."""
    mostly: Share
    """The share of rows that must pass; below it the stage fails, or with `warn` the report says so."""


class RepairableCheck(Section):
    """Action on rows in which a check finds something that can be repaired."""

    action: Literal["reject", "repair", "warn", "ignore"]
    """To quarantine; repaired, with a record of each change; counted in the report; or not looked at."""
    mostly: Share
    """The share of rows that must pass; below it the stage fails, or with `warn` the report says so."""


class Checks(Section):
    """What is looked for in every row; tasks/validate/row_features.py says how each is told."""

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
    """Rules that a row must meet, and how many may fail."""

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
