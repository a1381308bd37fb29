"""A Llama-shaped model folder as one GGUF file, as llama.cpp and Ollama read it.

The format is the `gguf` package's; tensors go from file to file block by block. llama.cpp's own tokenizers are told by
name, so one whose rules it does not know is refused, not guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.artifacts import read_object
from tasks.core.errors import BadModel
from tasks.deltas.lazy_tensors import OfShape
from tasks.merge.export.ollama import begins_with
from tasks.models.loader import model_files
from tasks.models.safetensors_reader import StoredTensor, TensorSource, blocks, rounded, stored_in

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from numpy.typing import NDArray

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Llama-shaped families, by their model_type, and what llama.cpp calls them."""

GGUF_FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""What matrices may be written as, and what GGUF calls it."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {"qwen2": rf"{_WORDS}|\p{{N}}{_REST}", "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"}
"""Patterns by which byte-level tokenizers split texts, and llama.cpp's names for them."""

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
"""Kinds of tokens, as GGUF numbers them."""


def write_gguf(model: Path, path: Path, dtype: str) -> None:
    """Write a model folder as a GGUF file.

    Args:
        model: a folder with a Llama-shaped model.
        path: the file to write; what stands there is overwritten.
        dtype: a key of FORMATS, of matrices; vectors are float32.

    Raises:
        BadModel: the model is of another shape, or its tokenizer is none that llama.cpp has.
    """
    from gguf import GGUFWriter

    model_files(model)
    config = read_object(model / "config.json")
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise BadModel(
            "has no form in GGUF here", where=str(model), got=kind, expected=", ".join(sorted(ARCHITECTURES))
        )
    if lacks := [key for key in _NEEDED if not config.get(key)]:
        raise BadModel("does not say its shape", where=str(model / "config.json"), got=f"no {', '.join(lacks)}")
    tokenizer = vocabulary_of(model, int(config["vocab_size"]))
    tensors = _tensors(model, config, dtype)
    writer = GGUFWriter(path, ARCHITECTURES[kind])
    try:
        _say_shape(writer, config, dtype)
        _say_tokenizer(writer, model, tokenizer)
        for name, tensor in tensors.items():
            tensor.announce(writer, name)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout or [path.open("ab")]
        for tensor in tensors.values():
            writer.write_padding(file, file.tell())
            written = sum(file.write(block) for block in tensor.data())
            writer.write_padding(file, written)
    finally:
        writer.close()


# --- tensors ----------------------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """Tensor as it is written: its numbers, and their format as GGUF calls it."""

    source: TensorSource
    dtype: str

    def announce(self, writer: GGUFWriter, name: str) -> None:
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        kind = GGMLQuantizationType[self.dtype]
        shape = quant_shape_to_byte_shape(self.source.shape, kind)
        # shapes of float32 and float16 are in numbers, those of all other formats in bytes
        plain = {"F32": np.float32, "F16": np.float16}.get(self.dtype)
        given = self.source.shape if plain else shape
        nbytes = math.prod(shape)
        writer.add_tensor_info(name, given, np.dtype(plain or np.uint8), nbytes, raw_dtype=None if plain else kind)

    def data(self) -> Any:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        for block in blocks(self.source.shape):
            numbers = self.source.floats(*block)
            if self.dtype == "Q8_0":
                yield quantize(numbers, GGMLQuantizationType.Q8_0).tobytes()
            else:
                yield rounded(numbers, self.dtype).data


@dataclass(frozen=True)
class _Interleaved(OfShape):
    """Queries or keys of the llama family, whose halves of a head llama.cpp has by turns, (heads * width, in)."""

    heads: int

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        width = self.shape[0] // self.heads
        if len(self.shape) == 1:  # a bias, in one row
            found: NDArray[Any] = self.base.floats(0, 1).reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(1, -1)
            return found
        first, last = start // width * width, -(-stop // width) * width  # the heads that the rows are of
        halves = self.base.floats(first, last).reshape(-1, 2, width // 2, self.shape[1])
        return halves.swapaxes(1, 2).reshape(-1, self.shape[1])[start - first : stop - first]


@dataclass(frozen=True)
class _Numbers:
    numbers: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.numbers.shape)

    def floats(self, start: int, stop: int) -> NDArray[Any]:
        rows: NDArray[Any] = self.numbers.reshape(1, -1)[start:stop]
        return rows


def _tensors(model: Path, config: Mapping[str, Any], dtype: str) -> dict[str, _Tensor]:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = ARCHITECTURES[config["model_type"]]
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(MODEL_ARCH(number), int(config["num_hidden_layers"]))
    found, unknown = {}, []
    for name, stored in stored_in(model).items():
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if told is None:
            unknown.append(name)
            continue
        found[told] = _Tensor(_as_llama_has_it(name, stored, config, arch), _format_of(stored, dtype))
    if unknown:
        raise BadModel("has tensors that its shape has not", where=str(model), examples=unknown)
    if (factors := _rope_factors(config)) is not None:
        found["rope_freqs.weight"] = _Tensor(_Numbers(factors), "F32")
    return found


def _as_llama_has_it(name: str, stored: StoredTensor, config: Mapping[str, Any], arch: str) -> TensorSource:
    heads = config["num_attention_heads"]
    by_part = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    part = name.split(".")[-2]
    return _Interleaved(stored, by_part[part]) if arch == "llama" and part in by_part else stored


def _format_of(stored: StoredTensor, dtype: str) -> str:
    matrix = len(stored.shape) > 1
    if matrix and dtype == "q8_0" and stored.columns % 32:
        return GGUF_FORMATS["float16"]  # blocks of 32 do not fit
    return GGUF_FORMATS[dtype] if matrix else GGUF_FORMATS["float32"]


# --- what is said of the model ----------------------------------------------------------------------------------------


def _say_shape(writer: GGUFWriter, config: Mapping[str, Any], dtype: str) -> None:
    from gguf import LlamaFileType

    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = config.get("head_dim") or hidden // heads
    rope = _rope(config)
    writer.add_file_type(
        {
            "float32": LlamaFileType.ALL_F32,
            "float16": LlamaFileType.MOSTLY_F16,
            "bfloat16": LlamaFileType.MOSTLY_BF16,
            "q8_0": LlamaFileType.MOSTLY_Q8_0,
        }[dtype]
    )
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def context_of(config: Mapping[str, Any]) -> int:
    """Return how many tokens the model reads: a sliding window is the limit, as llama.cpp's Llama has none."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return int(min(filter(None, (config["max_position_embeddings"], window))))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how positions are turned into angles, in the one form of all versions of transformers.

    Raises:
        BadModel: the form is not supported here.
    """
    told = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    told |= config.get("rope_parameters") or {}
    kind = told.setdefault("rope_type", told.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise BadModel("scales its positions in a way that is not written to GGUF here", got=str(kind))
    return told


def _rope_factors(config: Mapping[str, Any]) -> NDArray[Any] | None:
    """Compute the divisors of Llama 3.1's frequencies, (width / 2,): 1 for high, `factor` for low, between for others.

    Source: transformers' `_compute_llama3_parameters`, whose result these factors give again.
    """
    import numpy as np

    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / lengths - low) / (high - low), 0, 1)
    factors: NDArray[Any] = (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
    return factors


# --- the tokenizer ----------------------------------------------------------------------------------------------------


class Vocabulary(NamedTuple):
    """A tokenizer as GGUF tells of it.

    Attributes:
        kind: `gpt2` for byte-level BPE, `llama` for BPE on characters with bytes to fall back on.
        rules: how texts are split first, by llama.cpp's name; empty for `llama`.
        tokens: their texts by number.
        types: the kind of each.
        scores: of each, for `llama`: what a pair is merged by, the largest first.
        merges: the pairs in the order in which they are merged, for `gpt2`.
        space_prefix: whether a space is put before every text.
    """

    kind: str
    rules: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    space_prefix: bool


def vocabulary_of(model: Path, size: int) -> Vocabulary:
    """Read the tokenizer of a model folder, with as many tokens as the model has.

    Raises:
        BadModel: it is none that llama.cpp has.
    """
    path = model / "tokenizer.json"
    if not path.is_file():
        raise BadModel("has no tokenizer.json, which a GGUF file is made of", where=str(model))
    told = read_object(path)
    body = told["model"]
    if body.get("type") != "BPE":
        raise BadModel("is no BPE, as llama.cpp has them", where=str(path), got=str(body.get("type")))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in body["merges"]]
    tokens = [f"[unused{number}]" for number in range(size)]
    types = [_UNUSED] * size
    known = [*body["vocab"].values(), *(added["id"] for added in told["added_tokens"])]
    if max(known, default=-1) >= size:
        raise BadModel("has more tokens than the model", where=str(path), got=str(max(known) + 1), expected=str(size))
    for token, number in body["vocab"].items():
        tokens[number], types[number] = token, _NORMAL
    for added in told["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if added["special"] else _USER
    if not body.get("byte_fallback"):
        return Vocabulary("gpt2", _rules(told, path), tokens, types, [], merges, False)
    ranks = {
        left + right: -float(n) for n, (left, _, right) in reversed(list(enumerate(m.partition(" ") for m in merges)))
    }
    scores = [ranks.get(token, -1e6 if len(token) > 1 else 0.0) for token in tokens]
    for byte in range(256):
        if (number := body["vocab"].get(f"<0x{byte:02X}>")) is not None:
            types[number] = _BYTE
    if body.get("unk_token") in body["vocab"]:
        types[body["vocab"][body["unk_token"]]] = _UNKNOWN
    return Vocabulary("llama", "", tokens, types, scores, [], "Prepend" in json.dumps(told["normalizer"]))


def _rules(told: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits texts."""
    steps = told["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    plain = not any(step.get("add_prefix_space") for step in steps)
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and plain:
        return "gpt-2"
    if (
        kinds == ["Digits", "ByteLevel"]
        and steps[0].get("individual_digits")
        and steps[1].get("use_regex", True)
        and plain
    ):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and plain:
        pattern = steps[0]["pattern"].get("Regex")
        if name := next((name for name, known in _PRE_TOKENIZERS.items() if known == pattern), None):
            return name
    raise BadModel(
        "splits texts by rules that are none of llama.cpp's known here",
        where=str(path),
        got=json.dumps(told["pre_tokenizer"])[:120],
        expected="those of GPT-2, SmolLM, Llama 3 or Qwen 2",
    )


def _say_tokenizer(writer: GGUFWriter, model: Path, vocabulary: Vocabulary) -> None:
    from tasks.tokenization.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(model)
    writer.add_tokenizer_model(vocabulary.kind)
    if vocabulary.rules:
        writer.add_tokenizer_pre(vocabulary.rules)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.kind == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    says: Mapping[str, Callable[[int], None]] = {
        "bos_token_id": writer.add_bos_token_id,
        "eos_token_id": writer.add_eos_token_id,
        "pad_token_id": writer.add_pad_token_id,
        "unk_token_id": writer.add_unk_token_id,
    }
    for name, say in says.items():
        number = getattr(tokenizer, name)
        if number is not None and number < len(vocabulary.tokens):  # transformers adds tokens that a family usually has
            say(number)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(str(tokenizer.chat_template))
        writer.add_add_bos_token(begins_with(tokenizer, tokenizer.bos_token))
    else:
        writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
