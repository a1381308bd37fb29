"""Replies that refuse to answer, found by how they begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.text.patterns import TextPattern, matches

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


REFUSAL = (
    r"(?i)as an ai (?:language )?model|i(?:'|’)?m sorry,? (?:but )?(?:i|as)|i cannot (?:assist|help|fulfil)|"
    r"i(?:'|’)?m (?:unable|not able) to|作为(?:一个|一名)?(?:人工智能|AI|语言模型)|(?:很)?抱歉，(?:但)?我(?:无法|不能)"
)
"""How a reply begins that declines, in English and Chinese."""

_BEGINNING = 160
"""Characters of a reply in which that is looked for."""


def refusing(replies: pa.Array) -> NDArray[np.int64]:
    """1 for each reply whose beginning declines, in English or Chinese, (replies,)."""
    import pyarrow.compute as pc

    return matches(pc.utf8_slice_codeunits(replies, 0, _BEGINNING), TextPattern(REFUSAL))
