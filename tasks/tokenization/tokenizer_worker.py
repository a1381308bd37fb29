"""A tokenizer's steps before and after its vocabulary, as the worker of `tasks/core/limited_process.py` tries them."""

from __future__ import annotations

from collections.abc import Callable


def step_prober(tokenizer: str) -> Callable[[str], str]:
    """Load a tokenizer, as JSON; return what tells how long a text becomes in its longest form."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_str(tokenizer)

    def longest(text: str) -> str:
        normal = loaded.normalizer.normalize_str(text) if loaded.normalizer else text
        pieces = (
            [each for each, _ in loaded.pre_tokenizer.pre_tokenize_str(normal)] if loaded.pre_tokenizer else [normal]
        )
        back = loaded.decoder.decode(pieces) if loaded.decoder else ""
        return str(max(len(normal), sum(map(len, pieces)), len(back)))

    return longest
