"""A registered encoder-decoder model as MLflow loads it.

    mlflow.pyfunc.load_model("models:/NAME@champion").predict({"input": "..."})

MLflow runs this file when it loads a model ("models from code"), so nothing is ever unpickled. A request holds one
input, a data frame one per line; each gets what the model writes, and why it ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow.models import set_model

from tasks.serving.chat_model import ChatModel, options


class TextModel(ChatModel):
    """Answers inputs, instead of conversations, with the model folder that the version holds."""

    def _complete(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        from tasks.core.errors import BadData
        from tasks.inference.chat import answer_text

        asked = row.get("input")
        if not isinstance(asked, str) or not asked.strip():
            raise BadData("is no input", got=repr(asked), expected="a text")
        reply = answer_text(self.model, self.tokenizer, asked, *options(row))
        used = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
        return {"output": reply.text, "finish_reason": "stop" if reply.stopped else "length", "usage": used}


set_model(TextModel())  # after chat_model, whose own model is another
