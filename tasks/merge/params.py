"""The section `merge` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tasks.core.params import Count, HubName, Positive, Section


class SafetensorsExport(Section):
    """The model once more, in another number format or in shards of another size."""

    kind: Literal["safetensors"]
    dtype: Literal["own", "bfloat16", "float16", "float32"] = "own"
    """Of all weights; `own`: as the base has them."""
    max_shard_mib: Count = 4096
    """A file of weights is at most so large."""


class GgufExport(Section):
    """One GGUF file, as llama.cpp and Ollama read it, of a Llama-shaped model."""

    kind: Literal["gguf"]
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "q8_0"
    """Of matrices; vectors are float32. q8_0: 8 bits, with a scale for each 32 numbers."""
    ollama: bool = True
    """Also a Modelfile with the model's chat template, for `ollama create`."""


class HubExport(Section):
    """A push to the Hugging Face hub, as one commit; the token is HF_TOKEN or that of `hf auth login`."""

    kind: Literal["hub"]
    id: HubName
    """Owner and name of the repository; it is made if there is none."""
    private: bool = True
    """A new repository is for its owner alone."""


Export: TypeAlias = Annotated[SafetensorsExport | GgufExport | HubExport, Field(discriminator="kind")]


class Merge(Section):
    """Folding an adapter into the 16-bit base, and how closely the two must agree."""

    onto: Literal["closest", "original", "dequantized"] = "closest"
    """What the update of a quantized base is added to: the base's weights, what their quantized form stands for (what
    was trained on), or whichever of both comes closer to the model that was trained."""
    max_shard_mib: Count = 4096
    """A file of weights is at most so large."""
    probe_examples: Count = 16
    """Held-out rows on which adapter model and merged model are compared."""
    max_mean_kl: Positive = 0.01
    """Nats per token, adapter model against merged model."""
    exports: list[Export] = []
    """Further forms of the model, in data/exports/METHOD/."""
