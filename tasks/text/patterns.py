"""Patterns of what should not stand in training rows: addresses, telephone numbers, keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


class TextPattern(NamedTuple):
    """Pattern counted in texts: a regular expression (RE2), and a plain text without which it cannot match."""

    regex: str
    needs: str = ""


PATTERNS: Mapping[str, tuple[TextPattern, ...]] = {
    "control_tokens": (
        TextPattern(r"<\|[A-Za-z0-9_]+\|>", "<|"),
        TextPattern(r"</?s>|<(?:start|end)_of_turn>|\[/?INST\]"),
    ),
    "template_text": (
        TextPattern(r"(?m)^### ?(?:Instruction|Response|Input|Human|Assistant):", "### "),
        TextPattern(r"Below is an instruction that describes a task", "Below is an instr"),
        TextPattern(r"\A\s*(?:Human|User|USER): .*\n+(?:Assistant|ASSISTANT):"),
    ),
    "placeholders": (TextPattern(r"\{\{ ?[A-Za-z_][A-Za-z0-9_. ]*\}\}", "{{"),),
    "html": (
        TextPattern(
            r"</?(?:a|b|i|u|p|br|hr|div|span|li|ul|ol|table|tr|td|th|img|h[1-6]|body|html|head|strong|em|su[bp]|font|center|"
            r"script|style|select|option|svg|audio|video|iframe|form|input|button|pre)(?:\s[^<>]*)?/?>",
            "<",
        ),
        TextPattern(r"&(?:nbsp|amp|lt|gt|quot|#\d+);", "&"),
    ),
    "replacement_characters": (TextPattern("\ufffd", "\ufffd"),),
    "mojibake": (TextPattern(r"Ã[\x{80}-\x{bf}]|â€[\x{80}-\x{bf}™œ“”˜¦]|Â[\x{a0}-\x{bf}]|ï»¿"),),
    "emails": (
        TextPattern(r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}", "@"),
    ),
    "phone_numbers": (
        TextPattern(r"(?:\+\d{1,3}[ .-]?)?\(\d{3}\) ?\d{3}[ .-]\d{4}\b", "("),
        TextPattern(r"(?:\b|\+)(?:\d{1,3}[ .-])?\d{3}[.-]\d{3}[.-]\d{4}\b|\+\d{1,3}(?:[ .-]?\d{2,4}){3,4}\b"),
        TextPattern(r"\b1[3-9]\d{9}\b"),
    ),
    "secrets": (
        TextPattern(r"\b(?:sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b"),
        TextPattern(
            r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----[^-]*(?:-----END (?:[A-Z]+ )?PRIVATE KEY-----)?", "-----BEGIN"
        ),
    ),
}
"""What each fact of that name counts, over all texts of a row."""


def matches(texts: pa.Array, pattern: TextPattern, *, count: bool = False) -> NDArray[np.int64]:
    """Count the matches of a pattern in each text, or only whether it matches."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    found = np.zeros(len(texts), np.int64)
    places = np.arange(len(texts))
    if pattern.needs:
        places = np.flatnonzero(pc.match_substring(texts, pattern=pattern.needs).to_numpy(zero_copy_only=False))
        if not len(places):
            return found
        texts = texts.take(pa.array(places))
    run = pc.count_substring_regex if count else pc.match_substring_regex
    found[places] = run(texts, pattern=pattern.regex).to_numpy(zero_copy_only=False)
    return found
