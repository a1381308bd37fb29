"""Checkpoints of a Llama written here by plain PyTorch code: its own norm, rotation, grouped attention and MLP."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from tasks.base.params import CheckpointBase
from tasks.base.stage import check_loads, put
from tasks.core.errors import BadModel
from tasks.models.loader import load_model
from tests.helpers.samples import stored

WORDS = ["<|end|>", *"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS = 32, 24, 40, 3, 4, 2


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + 0.1 * torch.randn(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    """Heads one by one, each rotated as complex numbers; `neighbours` says which two numbers make one."""

    def __init__(self, width: int, heads: int, kv_heads: int, theta: float, neighbours: bool) -> None:
        super().__init__()
        self.size, self.heads, self.kv_heads, self.theta = width // heads, heads, kv_heads, theta
        self.neighbours = neighbours
        self.q_proj = nn.Linear(width, heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, width, bias=False)

    def turn(self, x: Tensor) -> Tensor:
        half = self.size // 2
        angles = torch.arange(len(x))[:, None] * self.theta ** (-torch.arange(half) / half)
        first, second = (x[:, 0::2], x[:, 1::2]) if self.neighbours else (x[:, :half], x[:, half:])
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=1)

    def forward(self, x: Tensor) -> Tensor:  # (tokens, width)
        out = []
        for head in range(self.heads):
            of = slice(head * self.size, (head + 1) * self.size)
            group = head // (self.heads // self.kv_heads)
            kv = slice(group * self.size, (group + 1) * self.size)
            q, k, v = self.turn(self.q_proj(x)[:, of]), self.turn(self.k_proj(x)[:, kv]), self.v_proj(x)[:, kv]
            scores = (q @ k.T / math.sqrt(self.size)).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
            out.append(scores.softmax(-1) @ v)
        return self.o_proj(torch.cat(out, dim=1))  # type: ignore[no-any-return]


class Gated(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate / (1 + torch.exp(-gate)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        width = sizes["hidden"]
        self.self_attn = Attention(width, sizes["heads"], sizes["kv_heads"], sizes["theta"], sizes["neighbours"])
        self.mlp = Gated(width, sizes["mlp"])
        self.input_layernorm, self.post_attention_layernorm = Norm(width, sizes["eps"]), Norm(width, sizes["eps"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Original(nn.Module):
    def __init__(self, tied: bool = False, **changes: Any) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "vocabulary": VOCABULARY,
            "hidden": HIDDEN,
            "mlp": MLP,
            "layers": LAYERS,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "eps": 1e-5,
            "theta": 10_000.0,
            "neighbours": False,
            **changes,
        }
        self.base_model = nn.Module()
        self.base_model.embed_tokens = nn.Embedding(sizes["vocabulary"], sizes["hidden"])
        self.base_model.layers = nn.ModuleList([Block(sizes) for _ in range(sizes["layers"])])
        self.base_model.norm = Norm(sizes["hidden"], sizes["eps"])
        self.lm_head = nn.Linear(sizes["hidden"], sizes["vocabulary"], bias=False)
        if tied:
            self.lm_head.weight = self.base_model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.base_model.embed_tokens(ids)  # type: ignore[operator]
        for block in self.base_model.layers:  # type: ignore[union-attr]
            x = block(x)
        return self.lm_head(self.base_model.norm(x))  # type: ignore[no-any-return,operator]


def original(**changes: Any) -> Original:
    torch.manual_seed(3)
    return Original(**changes).requires_grad_(False)


def params(folder: Path, **changes: Any) -> CheckpointBase:
    values: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(folder),
        "weights": "model.pt",
        "tokenizer": "tokenizer.json",
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "rms_norm_eps": 1.0e-5,
        "rope_theta": 10000.0,
        "rotation": "half_split",
        "context_tokens": 64,
        "stop_token": "<|end|>",
        "template": "own",
    }
    return CheckpointBase.model_validate({**values, **changes})


def save(folder: Path, content: Any, tokens: list[str] = WORDS) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "model.pt")
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def imported(base: CheckpointBase, out: Path) -> Any:
    out.mkdir()
    put(base, out, out)
    return load_model(out, full_precision=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rotation", ["half_split", "interleaved"])
def test_logits_are_those_of_the_original_modules(tmp_path: Path, tied: bool, rotation: str) -> None:
    theirs = original(tied=tied, neighbours=rotation == "interleaved")
    ours = imported(params(save(tmp_path / "in", theirs.state_dict()), rotation=rotation), tmp_path / "out")
    ids = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids[None]).logits[0], theirs(ids), atol=1e-5, rtol=0)
    assert ours.config.tie_word_embeddings == tied
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}


def test_the_other_rotation_or_theta_would_be_noticed(tmp_path: Path) -> None:
    theirs = original()
    folder = save(tmp_path / "in", theirs.state_dict())
    ids = torch.arange(20)
    others: list[dict[str, Any]] = [{"rotation": "interleaved"}, {"rope_theta": 500.0}, {"rms_norm_eps": 0.1}]
    for number, changes in enumerate(others):
        ours = imported(params(folder, **changes), tmp_path / str(number))
        assert (ours(ids[None]).logits[0] - theirs(ids)).abs().max() > 1e-3


def test_the_shape_that_is_asked_for_twelve_layers_of_768(tmp_path: Path) -> None:
    """12 layers, hidden size 768, 12 heads of which 3 are for keys and values; with a small vocabulary."""
    theirs = original(vocabulary=64, hidden=768, mlp=1024, layers=12, heads=12, kv_heads=3)
    with torch.no_grad():
        for block in theirs.base_model.layers:  # type: ignore[union-attr]
            block.self_attn.o_proj.weight *= 0.2  # as trained models are: the sums of twelve layers stay near 1
    base = params(save(tmp_path / "in", {"model": theirs.state_dict(), "step": 7}), heads=12, kv_heads=3)
    ours = imported(base, tmp_path / "out")
    assert (ours.config.num_hidden_layers, ours.config.hidden_size, ours.config.intermediate_size) == (12, 768, 1024)
    ids = torch.arange(24)
    torch.testing.assert_close(ours(ids[None]).logits[0], theirs(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
def test_what_trainers_wrap_around_a_state_dict_is_taken_off(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    theirs = original()
    state: Any = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    content = {wrapper: state, "optimizer": {"state": {}}, "step": 3, "args": {"lr": 0.1}} if wrapper else state
    ours = imported(params(save(tmp_path / "in", content)), tmp_path / "out")
    ids = torch.arange(9)
    torch.testing.assert_close(ours(ids[None]).logits[0], theirs(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_number_format_is_kept_where_a_model_folder_can_have_it(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = original().to(dtype)
    folder = save(tmp_path / "in", theirs.state_dict())
    (tmp_path / "out").mkdir()
    put(params(folder), tmp_path / "out", tmp_path)
    kept = stored(tmp_path / "out")["model.embed_tokens.weight"]
    assert kept.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert torch.equal(kept.double(), theirs.state_dict()["base_model.embed_tokens.weight"].double())


def test_with_a_chat_template_it_is_a_base_that_the_factory_takes(tmp_path: Path) -> None:
    folder, out = save(tmp_path / "in", original().state_dict()), tmp_path / "out"
    out.mkdir()
    about = put(params(folder, template="chatml"), out, tmp_path)
    assert about == {"added_tokens": ["<|im_start|>", "<|im_end|>", "<|pad|>"]}
    model = check_loads(out, "here", chats=True)
    assert model.config.vocab_size == VOCABULARY  # there was room for them
    rows = model.state_dict()["model.embed_tokens.weight"]
    torch.testing.assert_close(rows[len(WORDS)], rows[: len(WORDS)].float().mean(0).to(rows.dtype))
    (tmp_path / "none").mkdir()
    put(params(folder), tmp_path / "none", tmp_path)
    with pytest.raises(BadModel, match="no chat template"):
        check_loads(tmp_path / "none", "here", chats=True)


def broken(name: str, change: Any) -> dict[str, Tensor]:
    state = dict(original().state_dict())
    state[name] = change(state[name])
    return state


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in original().state_dict().items() if key != name}


K = "base_model.layers.1.self_attn.k_proj.weight"
NAN = torch.tensor(math.nan)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({**original().state_dict(), "base_model.layers.0.bias": torch.ones(2)}, "base_model.layers.0.bias: unknown"),
        ({"transformer.wte.weight": torch.ones(2, 2)}, "transformer.wte.weight: unknown"),
        (without("base_model.norm.weight"), "base_model.norm.weight: missing"),
        (without(K), f"{K}: missing"),
        (without("base_model.embed_tokens.weight"), "embed_tokens.weight: missing"),
        ({key: t for key, t in original().state_dict().items() if ".1." not in key}, "layers.1.input_layernorm"),
        (broken(K, lambda t: t[:6]), f"{K}: (6, 24), expected (12, 24)"),
        (broken("base_model.embed_tokens.weight", lambda t: t[0]), "no matrices of numbers"),
        (broken(K, lambda t: t.int()), f"{K}: int32"),
        (broken(K, lambda t: t.to(torch.float8_e4m3fn)), f"{K}: float8_e4m3fn"),
        (broken(K, lambda t: t.to("meta")), f"{K}: float32, without numbers"),
        (broken(K, lambda t: t.to_sparse()), f"{K}: float32, sparse_coo"),
        ({**original().state_dict(), "base_model.layers.2000000.x": NAN}, "layer 2,000,000 among 31 tensors"),
        ({**original().state_dict(), f"base_model.layers.1{'0' * 5000}.x": NAN}, "0.x: unknown"),
        (broken(K, lambda t: torch.where(t > 0, NAN, t)), "not finite"),
        (broken("lm_head.weight", lambda t: t / 0), "not finite"),
        ({"epoch": 3}, "got:      epoch"),
        ({"model": {"a": 1}}, "holds no state dict"),
        ({"model": original().state_dict(), "module": original().state_dict()}, "holds no state dict"),
        ([torch.ones(2)], "got:      list"),
        ({}, "got:      nothing"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "holds a tensor twice"),
        (original(), "holds more than tensors"),
        ({"model": original().state_dict(), "config": Path("x")}, "holds more than tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_that_is_not_one_is_refused_in_one_block(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(BadModel) as caught:
        imported(params(save(tmp_path / "in", content)), tmp_path / "out")
    assert said in str(caught.value)
    assert "model.pt" in caught.value.where


@pytest.mark.parametrize("changes", [{"heads": 5, "kv_heads": 1}, {"kv_heads": 4}, {"heads": 8}, {"heads": 24}])
def test_heads_that_do_not_fit_the_tensors_are_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(BadModel, match="do not fit"):
        imported(params(save(tmp_path / "in", original().state_dict()), **changes), tmp_path / "out")


def test_kv_heads_must_divide_heads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        params(tmp_path, kv_heads=3)


@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, 0.99])
def test_a_torn_file_is_refused(tmp_path: Path, kept: float) -> None:
    for number, new in enumerate((True, False)):
        folder = save(tmp_path / str(number), original().state_dict())
        file = folder / "model.pt"
        torch.save(original().state_dict(), file, _use_new_zipfile_serialization=new)
        content = file.read_bytes()
        file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
        with pytest.raises(BadModel, match="no PyTorch checkpoint, or a torn one"):
            imported(params(folder), tmp_path / f"out {number}")


def test_text_pickles_and_nothing_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", original().state_dict())
    for number, content in enumerate((b"hello", b'{"a": 1}', pickle.dumps({"a": Path("x")}), bytes(range(256)))):
        (folder / "model.pt").write_bytes(content)
        with pytest.raises(BadModel, match=r"model\.pt: (is no PyTorch checkpoint|holds more than tensors)"):
            imported(params(folder), tmp_path / str(number))
    with pytest.raises(BadModel, match="does not exist"):
        imported(params(folder, weights="other.pt"), tmp_path / "none")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", original().state_dict(), [*WORDS, *(str(n) for n in range(6))])
    with pytest.raises(BadModel, match="more tokens than the checkpoint has embeddings") as caught:
        imported(params(folder), tmp_path / "one")
    assert (caught.value.got, caught.value.expected) == ("33 tokens", "at most 32")
    save(folder, original().state_dict())
    with pytest.raises(BadModel, match="has no such token"):
        imported(params(folder, stop_token="</s>"), tmp_path / "two")
    for number, text in enumerate(("", "{}", '{"model": {"type": "What"}}')):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(BadModel, match="no readable tokenizer"):
            imported(params(folder), tmp_path / f"three {number}")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadModel, match="no readable tokenizer"):
        imported(params(folder), tmp_path / "four")
