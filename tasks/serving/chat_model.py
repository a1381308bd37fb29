"""A registered model as MLflow loads it.

    mlflow.pyfunc.load_model("models:/NAME@champion").predict({"messages": [{"role": "user", "content": "..."}]})

MLflow runs this file when it loads a model ("models from code"), so nothing is ever unpickled. The request and the
reply have the shape of llm/v1/chat; a request holds one conversation, a data frame holds one per line. Replies are
greedy unless the request says otherwise: `temperature`, `top_k`, `top_p`, `repetition_penalty`, `repetition_range` and
`seed` are as in params.yaml, below `evaluate.generation`. The same request gets the same reply, also when it is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from tasks.registry.names import ABOUT, ARTIFACT

if TYPE_CHECKING:
    from tasks.inference.params import Generation

MAX_TOKENS = 128
"""A reply is at most so long unless the request says `max_tokens`."""


class ChatModel(PythonModel):
    """Answers conversations with the model folder that the version holds."""

    def load_context(self, context: Any) -> None:
        """Load the folder after checking it against its manifest and, where a key is given, its signature."""
        from tasks.adapters.attach import load_packaged
        from tasks.core.artifacts import read_manifest
        from tasks.registry.signing import verify_model
        from tasks.tokenization.chat_template import load_tokenizer

        folder = Path(context.artifacts[ARTIFACT])
        read_manifest(folder)
        verify_model(folder, Path(context.artifacts.get(ABOUT, folder)))
        self.tokenizer = load_tokenizer(folder)
        self.model = load_packaged(folder)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Answer each conversation of the input; one chat completion for each.

        Raises:
            MlflowException: a request cannot be answered; a server answers with status 400.
        """
        from tasks.core.errors import BadInput

        try:
            return [self._complete(row) for row in model_input.to_dict("records")]
        except BadInput as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _complete(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        from tasks.core.records import conversation
        from tasks.inference.chat import answer

        reply = answer(self.model, self.tokenizer, conversation(row.get("messages")), *options(row))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": "stop" if reply.stopped else "length",
        }
        used = {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.tokens,
            "total_tokens": reply.prompt_tokens + reply.tokens,
        }
        return {"object": "chat.completion", "model": "temper", "choices": [choice], "usage": used}


def options(row: Mapping[Any, Any]) -> tuple[int, Generation]:
    """Return how long a reply to a request may be, and how it is generated.

    Raises:
        BadParams: an option is out of range.
    """
    from tasks.core.errors import BadParams
    from tasks.inference.params import Generation, generation_of

    # a data frame turns whole numbers into floats where another line has none
    asked = {
        name: int(row[name]) if isinstance(row[name], float) and row[name].is_integer() else row[name]
        for name in ("max_tokens", *Generation.model_fields)
        if name in row and not (pd.api.types.is_scalar(row[name]) and pd.isna(row[name]))
    }
    limit = asked.pop("max_tokens", MAX_TOKENS)
    if not isinstance(limit, int) or limit < 1:
        raise BadParams("is no length", where="max_tokens", got=repr(limit), expected="a whole number, at least 1")
    return limit, generation_of(asked, "the request")


set_model(ChatModel())
