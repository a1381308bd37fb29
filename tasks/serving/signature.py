"""Serving of registered models: the code that MLflow runs, what it needs, and the form of a request and a reply."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.inference.params import Generation
from tasks.tokenization.architecture import ENCODER_DECODER, architecture_in

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec

_NEEDED = (
    "accelerate",
    "aenum",
    "jinja2",
    "mlflow",
    "numpy",
    "pandas",
    "peft",
    "psutil",
    "pydantic",
    "safetensors",
    "torch",
    "transformers",
)
"""What a registered model needs to run."""

_NEEDED_TO_VERIFY = ("model-signing", "pyopenssl")


def requirements(*, signed: bool) -> list[str]:
    """List the packages that a registered model needs, at the versions that are installed here."""
    names = (*_NEEDED, *(_NEEDED_TO_VERIFY if signed else ()))
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]


def chat_signature() -> ModelSignature:
    """Build the signature of llm/v1/chat's request and reply, as far as small models have them, with its options."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    text, number = DataType.string, DataType.long
    message = Object([Property("role", text), Property("content", text)])
    choice = Object([Property("index", number), Property("message", message), Property("finish_reason", text)])
    usage = Object([Property(name, number) for name in ("prompt_tokens", "completion_tokens", "total_tokens")])
    request = Schema([ColSpec(Array(message), "messages"), *_options()])
    reply = Schema(
        [ColSpec(text, "object"), ColSpec(text, "model"), ColSpec(Array(choice), "choices"), ColSpec(usage, "usage")]
    )
    return ModelSignature(inputs=request, outputs=reply)


def text_signature() -> ModelSignature:
    """Build the signature of an input and what is written for it, of an encoder-decoder model."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Object, Property, Schema

    text, number = DataType.string, DataType.long
    usage = Object([Property(name, number) for name in ("prompt_tokens", "completion_tokens")])
    request = Schema([ColSpec(text, "input"), *_options()])
    reply = Schema([ColSpec(text, "output"), ColSpec(text, "finish_reason"), ColSpec(usage, "usage")])
    return ModelSignature(inputs=request, outputs=reply)


def _options() -> list[ColSpec]:
    """Return the columns of how a reply is generated.

    Their values the model itself checks: MLflow would refuse a temperature of 2, being no 2.0, and nulls.
    """
    from mlflow.types.schema import AnyType, ColSpec

    anything = AnyType()  # type: ignore[no-untyped-call]
    return [ColSpec(anything, name, required=False) for name in ("max_tokens", *Generation.model_fields)]


class ServingSpec(NamedTuple):
    """Serving of models of a kind: the file that MLflow runs, its signature, and a request as an example."""

    code: Path
    signature: ModelSignature
    example: dict[str, Any]


def serving_spec(models: Path) -> ServingSpec:
    """Return how the model of a folder is served."""
    from tasks.serving import chat_model, text_model

    asked = "What is 17 plus 25?"
    if architecture_in(models) is ENCODER_DECODER:
        return ServingSpec(Path(text_model.__file__), text_signature(), {"input": asked})
    return ServingSpec(Path(chat_model.__file__), chat_signature(), {"messages": [{"role": "user", "content": asked}]})
