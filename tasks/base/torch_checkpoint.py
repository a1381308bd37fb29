"""A Llama from a plain PyTorch checkpoint: a state dict by another code's names becomes a Hugging Face model folder.

Only tensors are read (`weights_only`), never code. What the tensors tell is read off them: the sizes of vocabulary,
hidden states and MLP, the number of layers, and whether the output head is the embedding.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.base.params import CheckpointBase
from tasks.core.errors import BadModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import LlamaConfig

WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which training codes save the state dict beside other things."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before names, in any order and number."""

EMBEDDING, NORM, HEAD = "base_model.embed_tokens.weight", "base_model.norm.weight", "lm_head.weight"
LAYER = re.compile(r"base_model\.layers\.(0|[1-9]\d{0,8})\.")
_FORMATS = ("float32", "bfloat16", "float16")
_READABLE = (*_FORMATS, "float64")


class Sizes(NamedTuple):
    """The sizes that tensors tell."""

    vocabulary: int
    hidden: int
    mlp: int
    layers: int
    head: int


def import_checkpoint(params: CheckpointBase, out: Path) -> None:
    """Write the model folder: config.json, safetensors, tokenizer.

    Raises:
        BadModel: the checkpoint or the tokenizer cannot be read, does not fit params or each other, or has values that
            are not finite.
    """
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    file = Path(params.path, params.weights)
    state = unwrap(read_tensors(file), file)
    sizes = read_sizes(state, params, file)
    check_values(state, file)
    tokenizer = read_tokenizers_json(Path(params.path, params.tokenizer), params.stop_token, sizes.vocabulary)
    tied = HEAD not in state or torch.equal(state[HEAD], state[EMBEDDING])
    config = llama_config(params, sizes, tied=tied, stop_id=tokenizer.get_vocab()[params.stop_token])
    dtype = common_dtype(state)
    weights = {name: tensor.to(dtype) for name, tensor in renamed(state, params, sizes)}
    if tied:
        weights[HEAD] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=params.stop_token, clean_up_tokenization_spaces=False
    ).save_pretrained(out)


def read_tensors(file: Path) -> Any:
    """Load what torch.save wrote, without running what a pickle asks for.

    Raises:
        BadModel: there is no such file, it is torn, or it holds more than tensors.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadModel("does not exist", where=str(file), fix="correct base.path or base.weights") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, OSError) as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise BadModel(
                "holds more than tensors: loading it could run any code",
                where=str(file),
                got=asked[1],
                fix="save the model's state_dict() alone, with torch.save",
            ) from error
        # what the unpickler and the archive reader say of bytes that are not theirs
        said = f"{type(error).__name__}: {error}".split("\n")[0][:120]
        raise BadModel(
            "is no PyTorch checkpoint, or a torn one", where=str(file), got=said, fix="copy it again"
        ) from error


def unwrap(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict within what was saved, without the prefixes of wrappers.

    Raises:
        BadModel: there is none, or two names become the same.
    """
    inner = [content[key] for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)]
    found = inner[0] if len(inner) == 1 else content
    if not _is_state(found):
        keys = ", ".join(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise BadModel(
            "holds no state dict that is told apart",
            where=str(file),
            got=keys[:200] or "nothing",
            expected=f"names and tensors, or one of {', '.join(WRAPPERS)} with them within",
        )
    state: dict[str, Tensor] = {}
    for name, tensor in found.items():
        bare = name
        while bare.startswith(PREFIXES):
            bare = bare.partition(".")[2]
        if bare in state:
            raise BadModel("holds a tensor twice, with and without a wrapper's prefix", where=str(file), got=bare)
        state[bare] = tensor.detach()
    return state


def _is_state(content: Any) -> bool:
    import torch

    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items())
    )


def read_sizes(state: Mapping[str, Tensor], params: CheckpointBase, file: Path) -> Sizes:
    """Infer the sizes from the tensors, after checking that every tensor is there, known, and of its shape.

    Raises:
        BadModel: a tensor is not.
    """
    layers = 1 + max((int(found[1]) for name in state if (found := LAYER.match(name))), default=0)
    if layers > len(state):
        raise BadModel(
            "numbers its layers beyond the tensors that it holds",
            where=str(file),
            got=f"layer {layers - 1:,} among {len(state)} tensors",
            expected="layers from 0 on, without a gap",
        )
    wanted = set(shapes(Sizes(1, 1, 1, layers, 1), params))
    wrong = [f"{name}: unknown" for name in sorted(state.keys() - wanted)]
    wrong += [f"{name}: missing" for name in sorted(wanted - state.keys() - {HEAD})]
    if wrong:
        raise BadModel(
            f"is not the state dict of a Llama of {layers} layers by the names that are known",
            where=str(file),
            examples=wrong,
            expected=f"{EMBEDDING}, base_model.layers.0.self_attn.q_proj.weight, ..., {NORM}, {HEAD}",
            fix="rename the tensors where the checkpoint is written; leave out buffers and biases",
        )
    first = "base_model.layers.0."
    flat = [f"{name}: {_form(tensor)}" for name, tensor in state.items() if _form(tensor) not in _READABLE]
    flat += [
        f"{name}: {state[name].ndim} dimensions"
        for name in (EMBEDDING, f"{first}mlp.gate_proj.weight", f"{first}self_attn.q_proj.weight")
        if state[name].ndim != 2
    ]
    if flat:
        raise BadModel(
            "holds tensors that are no matrices of numbers",
            where=str(file),
            examples=sorted(flat),
            expected=f"dense tensors of {', '.join(_READABLE)}",
        )
    vocabulary, hidden = state[EMBEDDING].shape
    head = state[f"{first}self_attn.q_proj.weight"].shape[0] // params.heads
    sizes = Sizes(vocabulary, hidden, state[f"{first}mlp.gate_proj.weight"].shape[0], layers, head)
    expected = shapes(sizes, params)
    wrong = [
        f"{name}: {tuple(tensor.shape)}, expected {expected[name]}"
        for name, tensor in sorted(state.items())
        if tuple(tensor.shape) != expected[name]
    ]
    if wrong or hidden % params.heads or head % 2:
        raise BadModel(
            "holds tensors whose shapes do not fit params or each other",
            where=str(file),
            examples=wrong,
            got=f"hidden size {hidden}, {params.heads} heads of {head}, {params.kv_heads} for keys and values",
            fix="correct base.heads and base.kv_heads",
        )
    return sizes


def _form(tensor: Tensor) -> str:
    """Describe the dtype of a tensor; of one that is not strided also its layout."""
    import torch

    form = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return f"{form}, without numbers"
    return form if tensor.layout is torch.strided else f"{form}, {str(tensor.layout).removeprefix('torch.')}"


def shapes(sizes: Sizes, params: CheckpointBase) -> dict[str, tuple[int, ...]]:
    """Return every tensor's name and shape: (outputs, inputs) for matrices."""
    hidden, mlp = sizes.hidden, sizes.mlp
    queries, keys = params.heads * sizes.head, params.kv_heads * sizes.head
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {
        EMBEDDING: (sizes.vocabulary, hidden),
        NORM: (hidden,),
        HEAD: (sizes.vocabulary, hidden),
        **{f"base_model.layers.{n}.{name}.weight": shape for n in range(sizes.layers) for name, shape in layer.items()},
    }


def check_values(state: Mapping[str, Tensor], file: Path) -> None:
    """Refuse NaN and infinities.

    Raises:
        BadModel: there are some.
    """
    if broken := sorted(name for name, tensor in state.items() if not tensor.isfinite().all()):
        raise BadModel("has values that are not finite; refused", where=str(file), examples=broken)


def read_tokenizers_json(file: Path, stop_token: str, vocabulary: int) -> Tokenizer:
    """Load the tokenizer in a file of the library `tokenizers`.

    Raises:
        BadModel: it does not load, lacks the stop token, or has more tokens than there are embeddings.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        said = str(error).split("\n")[0]
        raise BadModel(
            "is no readable tokenizer", where=str(file), got=said, expected="JSON of `tokenizers`"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if tokens > vocabulary:
        raise BadModel(
            "has more tokens than the checkpoint has embeddings",
            where=str(file),
            got=f"{tokens} tokens",
            expected=f"at most {vocabulary}",
            fix="name the tokenizer that the model was trained with",
        )
    if tokenizer.token_to_id(stop_token) is None:
        raise BadModel("has no such token", where=str(file), got=stop_token, fix="correct base.stop_token")
    return tokenizer


def common_dtype(state: Mapping[str, Tensor]) -> Any:
    """Return the dtype that all tensors share, if a model folder can have it, else float32."""
    import torch

    (first, *others) = {tensor.dtype for tensor in state.values()}
    return first if not others and str(first).removeprefix("torch.") in _FORMATS else torch.float32


def llama_config(params: CheckpointBase, sizes: Sizes, *, tied: bool, stop_id: int) -> LlamaConfig:
    """Build the configuration of Hugging Face's Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=params.heads,
        num_key_value_heads=params.kv_heads,
        head_dim=sizes.head,
        rms_norm_eps=params.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": params.rope_theta},
        max_position_embeddings=params.context_tokens,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=stop_id,
    )


def renamed(state: Mapping[str, Tensor], params: CheckpointBase, sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors by Hugging Face's names; RoPE that turns neighbours is reordered to turn halves."""
    heads = {"q_proj": params.heads, "k_proj": params.kv_heads}
    for name, tensor in state.items():
        projection = name.split(".")[-2]
        if params.rotation == "interleaved" and projection in heads:
            pairs = tensor.view(heads[projection], sizes.head // 2, 2, sizes.hidden)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        yield re.sub("^base_model", "model", name), tensor.contiguous()
