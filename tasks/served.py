"""A registered model as MLflow loads it.

    mlflow.pyfunc.load_model("models:/NAME@champion").predict({"messages": [{"role": "user", "content": "..."}]})

MLflow runs this file when it loads a model ("models from code"), so nothing is ever unpickled. The request and the
reply have the shape of llm/v1/chat; a request holds one conversation, a data frame holds one per line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

ARTIFACT = "model"
"""The name under which a version keeps its model folder."""

MAX_TOKENS = 128
"""A reply is at most so long unless the request says `max_tokens`."""


class ChatModel(PythonModel):
    """Answers conversations with the model folder that the version holds."""

    def load_context(self, context: Any) -> None:
        """Loads the folder after checking it against its manifest."""
        from tasks.adapted import load_packaged
        from tasks.outputs import read_manifest
        from tasks.templates import load_tokenizer

        folder = Path(context.artifacts[ARTIFACT])
        read_manifest(folder)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_packaged(folder)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Answers each conversation of the input greedily; one chat completion for each."""
        return [self._complete(row) for row in model_input.to_dict("records")]

    def _complete(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        from tasks.chat import answer
        from tasks.records import Message

        turns = [Message(message["role"], message["content"]) for message in row["messages"]]
        limit = row.get("max_tokens")
        reply = answer(self.model, self.tokenizer, turns, MAX_TOKENS if pd.isna(limit) else int(limit))
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


set_model(ChatModel())
