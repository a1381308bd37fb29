"""Answers held to a JSON schema, token by token, by llguidance (github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from flows.serve.engines.pieces import Pieces
from flows.serve.errors import ApiError, unsupported
from tasks.core.errors import TemperError

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes; where any white space may stand, a small model writes nothing else to its last token."""

PARAM = "response_format.json_schema.schema"


class Grammars:
    """Makes constraints for one model.

    Args:
        tokenizer: of the model.
        vocabulary: how many logits the model has, of which some may stand for no token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._trie: LLTokenizer | None = None
        self.pieces = Pieces(self._read_pieces)

    def constraint(self, schema: Mapping[str, Any]) -> SchemaConstraint:
        """Build what holds one answer to a schema.

        Raises:
            ApiError: the schema is wrong, has what the library does not know, or is too large; or the tokenizer is of a
                kind that the library cannot read.
        """
        from llguidance import LLMatcher

        trie = self.trie("response_format")
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_SPACING)
        if said := LLMatcher.validate_grammar(grammar, trie):
            raise ApiError(HTTPStatus.BAD_REQUEST, f"{PARAM}: {said}", param=PARAM, code="invalid_value")
        return SchemaConstraint(LLMatcher(trie, grammar, log_level=0), self._vocabulary)

    def _read_pieces(self) -> list[bytes]:
        trie = self.trie("model")
        return [bytes(trie.decode_bytes([token])) for token in range(self._vocabulary)]

    def trie(self, param: str) -> LLTokenizer:
        """Return the tokens as the library has them; they are read once, which takes a second for a large vocabulary.

        Args:
            param: the field of the request that needs them.

        Raises:
            ApiError: the library does not know tokenizers of this kind.
        """
        if self._trie is None:
            from llguidance.hf import from_tokenizer

            try:
                self._trie = from_tokenizer(
                    self._tokenizer,
                    n_vocab=max(self._vocabulary, len(self._tokenizer)),
                    eos_token=self._tokenizer.eos_token_id,
                )
            except ValueError as error:
                raise unsupported(param, f"{param} is not supported with this tokenizer") from error
        return self._trie


class SchemaConstraint:
    """What may come next in one answer that is held to a schema; a `Constraint` of the engine."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> Tensor:
        """Return which tokens may come next, (vocab,) bool; only the end token where the answer is complete."""
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(bool))

    def take(self, token: int) -> None:
        """Note that a token was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise TemperError("the grammar of an answer failed", got=self._matcher.get_error().split("\n")[0])
