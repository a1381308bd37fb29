from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tasks.adapters.positions import parse_positions
from tasks.adapters.reft import ReftConfig, ReftLayer, from_pyreft, to_pyreft
from tasks.adapters.reft.interventions import INTERVENTIONS, Edit, Rotation
from tasks.adapters.reft.prompt_positions import Segments, find_positions, places, prompts_of
from tasks.adapters.reft.tuner import ReftModel
from tasks.core.errors import BadModel
from tests.conftest import REAL_DATA

GOLDEN = REAL_DATA.parent / "pyreft_golden"


# --- the edits --------------------------------------------------------------------------------------------------------

EQUATIONS: dict[str, Callable[..., Tensor]] = {
    "loreft": lambda h, p, w, b: h + p.T @ (w @ h + b - p @ h),
    "noreft": lambda h, p, w, b: h + p.T @ (w @ h + b - p @ h),
    "consreft": lambda h, p, w, b: h + p.T @ (b - p @ h),
    "lobireft": lambda h, p, w, b: h + p.T @ b,
    "direft": lambda h, p, w, b: h + p.T @ (w @ h + b),
    "nodireft": lambda h, p, w, b: h + p.T @ (w @ h + b),
}


def parts(edit: Edit) -> tuple[Tensor, Tensor, Tensor]:
    """P, W (zeros where there is none) and b."""
    free = edit.directions() if isinstance(edit.directions, Rotation) else edit.directions.weight
    if isinstance(edit.source, nn.Linear):
        return free, edit.source.weight, edit.source.bias
    return free, torch.zeros_like(free), edit.source


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_an_edit_is_its_equation(kind: str) -> None:
    torch.manual_seed(0)
    edit, hidden = Edit(kind, 6, 2, projection_bias=False).double(), torch.randn(3, 6, dtype=torch.float64)
    expected = torch.stack([EQUATIONS[kind](h, *parts(edit)) for h in hidden])
    torch.testing.assert_close(edit(hidden), expected)


def test_only_the_subspace_of_r_is_edited() -> None:
    """After the edit R h = W h + b, and what is orthogonal to the rows of R stays."""
    torch.manual_seed(1)
    edit, hidden = Edit("loreft", 8, 3), torch.randn(5, 8)
    rotation, weight, bias = parts(edit)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3))
    after = edit(hidden)
    torch.testing.assert_close(after @ rotation.T, hidden @ weight.T + bias)
    outside = torch.eye(8) - rotation.T @ rotation
    torch.testing.assert_close(after @ outside, hidden @ outside)


@pytest.mark.parametrize("kind", [kind for kind in INTERVENTIONS if INTERVENTIONS[kind].orthonormal])
def test_rows_stay_orthonormal_while_training(kind: str) -> None:
    torch.manual_seed(2)
    edit, hidden, target = Edit(kind, 8, 3), torch.randn(16, 8), torch.randn(16, 8)
    optimizer = torch.optim.AdamW(edit.parameters(), lr=0.05, weight_decay=0.0)
    before = parts(edit)[0].detach().clone()
    for _ in range(30):
        optimizer.zero_grad()
        (edit(hidden) - target).square().mean().backward()
        optimizer.step()
    after = parts(edit)[0].detach()
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after @ after.T, torch.eye(3), rtol=0, atol=1e-5)


def test_a_rotation_is_pytorchs_own_parametrization() -> None:
    """With B completed alike: the same matrix at rest and away from it, and the same gradient."""
    torch.manual_seed(3)
    linear: Any = nn.utils.parametrizations.orthogonal(nn.Linear(3, 7, bias=False))
    theirs = linear.parametrizations.weight
    ours = Rotation(7, 3)
    ours.set(linear.weight.mT.detach(), theirs[0].base)
    moved = 0.3 * torch.randn(7, 3)
    with torch.no_grad():
        theirs.original += torch.tril(moved, -1)
        ours.angles.add_(torch.tril(moved, -1))
    torch.testing.assert_close(ours().mT, linear.weight, rtol=0, atol=1e-6)
    wanted = torch.randn(7, 3)
    (linear.weight * wanted).sum().backward()
    (ours().mT * wanted).sum().backward()
    torch.testing.assert_close(ours.angles.grad, torch.tril(theirs.original.grad, -1), rtol=0, atol=1e-5)


def test_a_stored_rotation_is_the_trained_one_bit_for_bit() -> None:
    torch.manual_seed(4)
    trained, loaded = Rotation(9, 2), Rotation(9, 2)
    with torch.no_grad():
        trained.angles.add_(torch.randn(9, 2))
    loaded.load_state_dict(trained.state_dict(), strict=False)
    assert torch.equal(loaded().detach(), trained().detach())
    torch.testing.assert_close(loaded.weight @ loaded.weight.T, torch.eye(2))


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    torch.manual_seed(5)
    edit, hidden = Edit(kind, 5, 2).double(), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert torch.autograd.gradcheck(edit, (hidden,))
    weights = torch.randn(4, 5, dtype=torch.float64)
    (edit(hidden) * weights).sum().backward()
    for name, parameter in edit.named_parameters():
        assert parameter.grad is not None, name
        places = [(parameter.numel() - 1,), (parameter.numel() // 2,)]
        for (place,) in places:
            flat, step = parameter.detach().view(-1), 1e-6
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[place] = flat[place] + sign * step
                    values.append(float((edit(hidden) * weights).sum()))
                    parameter.view(-1)[place] -= sign * step
            numeric = (values[0] - values[1]) / (2 * step)
            assert float(parameter.grad.view(-1)[place]) == pytest.approx(numeric, rel=1e-4, abs=1e-7), name


# --- where prompts are ------------------------------------------------------------------------------------------------


def by_hand(valid: list[bool], labels: list[int], positions: str) -> set[int]:
    """The columns of one row's prompt that are edited, by pyreft's rule, in plain Python."""
    start = valid.index(True)
    trained = [n for n, label in enumerate(labels) if label != -100 and valid[n]]
    end = trained[0] if trained else len(valid) - valid[::-1].index(True)
    prompt, spans = list(range(start, end)), parse_positions(positions)
    if spans.all:
        return set(prompt)
    first, last = min(len(prompt) // 2, spans.first), min(len(prompt) // 2, spans.last)
    if (spans.first, spans.last) == (0, 1):
        last = min(len(prompt), 1)
    return set(prompt[:first]) | set(prompt[len(prompt) - last :])


@pytest.mark.parametrize("positions", ["last", "f1", "l3", "f2+l2", "f5+l5", "f1+l4", "all"])
def test_edited_tokens_are_those_of_the_prompt_under_any_padding(positions: str) -> None:
    columns = 9
    rows = [(left, right, prompt) for left in (0, 1, 3) for right in (0, 2) for prompt in (1, 2, 3, 4, None)]
    valid = [[left <= n < columns - right for n in range(columns)] for left, right, _ in rows]
    labels = [[7 if p is not None and n >= left + p else -100 for n in range(columns)] for left, _, p in rows]
    found = places(find_positions(torch.tensor(valid), torch.tensor(labels)), parse_positions(positions))
    edited = {(int(r), int(c)) for at in found.values() for r, c in zip(*at, strict=True)}
    expected = {(n, column) for n in range(len(rows)) for column in by_hand(valid[n], labels[n], positions)}
    assert edited == expected
    assert sum(len(at[0]) for at in found.values()) == len(expected)  # none twice


@pytest.mark.parametrize(
    ("tokens", "positions", "first", "last"),
    [
        (11, "f7+l7", [0, 1, 2, 3, 4], [6, 7, 8, 9, 10]),
        (11, "l7", [], [6, 7, 8, 9, 10]),
        (10, "f7+l7", [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]),
        (14, "f7+l7", list(range(7)), list(range(7, 14))),
        (15, "f7+l7", list(range(7)), list(range(8, 15))),
        (1, "f1+l1", [], []),
        (1, "last", [], [0]),
    ],
)
def test_short_prompts_are_edited_as_pyreft_does(
    tokens: int, positions: str, first: list[int], last: list[int]
) -> None:
    """By hand from its `get_intervention_locations`: min(tokens // 2, n) on each side."""
    prompts = Segments(torch.tensor([0]), torch.tensor([0]), torch.tensor([tokens]))
    found = places(prompts, parse_positions(positions))
    assert {name: columns.tolist() for name, (_, columns) in found.items()} == {
        name: columns for name, columns in (("first", first), ("last", last)) if columns or f"{name[0]}1" in positions
    }


def test_packed_rows_have_a_prompt_each() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    labels = torch.tensor([[-100, -100, 5, 5, -100, 5, 5, -100, -100]])
    found = find_positions(torch.ones(1, 9, dtype=torch.bool), labels, positions)
    assert [each.tolist() for each in found] == [[0, 0, 0], [0, 4, 7], [2, 1, 2]]


@pytest.mark.parametrize("text", ["", "f", "l0", "f0+l0", "x3", "f1+f2", "l2+f1", "last+f1", "f-1", "+l2", "f0+l2"])
def test_positions_that_there_are_not_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="positions"):
        parse_positions(text)


# --- as a method of PEFT ----------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "falcon": {"ffn_hidden_size": 32, "num_kv_heads": 2, "alibi": False},
    "gpt2": {"n_inner": 32},
    "t5": {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0},
}
DECODERS = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "falcon",
    "olmo2",
]


def pico_model(kind: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(4)
    given = {k: v for k, v in SHAPE.items() if kind != "t5" or not k.startswith(("hidden", "interm", "num_", "max_"))}
    config = transformers.AutoConfig.for_model(kind, **{**given, **OWN.get(kind, {}), **changes})
    made: Any = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    model = made.from_config(config).eval()
    with torch.no_grad():  # the usual first weights are so small that edits hardly show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def with_reft(model: Any, **changes: Any) -> Any:
    torch.manual_seed(5)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return get_peft_model(model, ReftConfig(**{"r": 2, "layers": [1], "task_type": task, **changes})).eval()


def edit_of(model: Any, layer: int, span: str = "last", adapter: str = "default") -> Any:
    found = [module for module in model.modules() if isinstance(module, ReftLayer)]
    edits: Any = found[layer].reft_edits[adapter]
    return edits[span]


def hidden_states(model: Any, **inputs: Any) -> tuple[Tensor, ...]:
    states: tuple[Tensor, ...] = model(**inputs, output_hidden_states=True).hidden_states
    return states


@torch.no_grad()
def test_only_the_chosen_tokens_of_the_edited_layer_change() -> None:
    plain, edited = pico_model(), with_reft(pico_model(), positions="f1+l2")
    ids = torch.arange(16).view(2, 8)
    labels = ids.clone()
    labels[0, :3], labels[1, :5] = -100, -100
    before, after = hidden_states(plain, input_ids=ids), hidden_states(edited, input_ids=ids, labels=labels)
    assert torch.equal(after[1], before[1])  # the input of layer 1
    changed = (after[2] - before[2]).abs().sum(-1) > 0  # its output
    assert changed.nonzero().tolist() == [[0, 0], [0, 2], [1, 0], [1, 3], [1, 4]]  # of three tokens one is last
    for span, at in (("first", ([0, 1], [0, 0])), ("last", ([0, 1, 1], [2, 3, 4]))):
        # all tokens of a span at once, as the layer edits them: a product over other rows may be rounded otherwise
        assert torch.equal(after[2][at], edit_of(edited, 0, span)(before[2][at]))


@torch.no_grad()
@pytest.mark.parametrize("kind", [*DECODERS, "t5"])
@pytest.mark.parametrize("component", ["block_output", "attention_output", "mlp_output"])
def test_every_family_is_edited_and_generates(kind: str, component: str) -> None:
    """The logits of batched generation, with padding and a cache, against one row at a time without a cache."""
    model = with_reft(pico_model(kind), layers="all", component=component, positions="f1+l2")
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10]]
    batch = {
        "input_ids": torch.tensor([[0, 0, *prompts[0]], prompts[1]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5]),
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    out = model.generate(**batch)
    with model.disable_adapter():
        assert (model.generate(**batch).logits[0] - out.logits[0]).abs().max() > 1e-4
    for place, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        if kind == "t5":
            alone = model.generate(**{**batch, "input_ids": ids, "attention_mask": None, "use_cache": False}).logits
        else:
            alone, labels = [], torch.full_like(ids, -100)
            for step in range(4):
                alone.append(model(input_ids=ids, labels=labels, use_cache=False).logits[:, -1])
                token = out.sequences[place, None, 5 + step, None]
                ids, labels = torch.cat([ids, token], 1), torch.cat([labels, token], 1)
        for step in range(4):
            torch.testing.assert_close(out.logits[step][place], alone[step][0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True}])
def test_other_ways_to_generate(options: dict[str, Any]) -> None:
    """Beams and a static cache against the same without a cache; samples by the same seed."""
    model = with_reft(pico_model(), layers="all", positions="f1+l1")
    rows, mask = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    common = {"input_ids": rows, "attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    if "do_sample" in options or "num_beams" in options:
        torch.manual_seed(0)
        one = model.generate(**{**common, **options})
        torch.manual_seed(0)
        assert torch.equal(one, model.generate(**{**common, **options}))
        if "num_beams" in options:  # beams of the longer row alone
            alone = model.generate(**{**common, "input_ids": rows[1:], "attention_mask": mask[1:], **options})
            assert one[1].tolist() == alone[0].tolist()
        return
    assert torch.equal(model.generate(**common), model.generate(**{**common, **options}))


def gradients(model: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
def test_checkpointed_layers_have_the_gradients_of_plain_ones(kind: str, component: str) -> None:
    """Also when another batch went through the model before the backward pass, as a reference model's does."""
    ids = torch.arange(16).view(2, 8) + 1
    labels, others = ids.clone(), ids.clone()
    labels[0, :3], labels[1, :5], others[:, :7] = -100, -100, -100
    model = with_reft(pico_model(kind), layers="all", component=component, positions="f1+l2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model, input_ids=ids, labels=labels)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels).loss
    with torch.no_grad():
        model(input_ids=ids[:, :4], labels=others[:, :4])
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_padding_and_packing_leave_loss_and_gradients_as_they_are() -> None:
    rows = [([3, 4, 5], [6, 7]), ([8, 9, 10, 11], [12, 13, 14])]
    model = with_reft(pico_model(attn_implementation="eager"), layers="all", positions="f1+l2").train()

    def batch(side: str) -> dict[str, Tensor]:
        tokens = [prompt + reply for prompt, reply in rows]
        marks = [[-100] * len(prompt) + reply for prompt, reply in rows]
        pads = [[0] * (7 - len(row)) for row in tokens]

        def put(pad: list[int], row: list[int]) -> list[int]:
            return pad + row if side == "left" else row + pad

        return {
            "input_ids": torch.tensor([put(p, t) for p, t in zip(pads, tokens, strict=True)]),
            "labels": torch.tensor([put([-100] * len(p), m) for p, m in zip(pads, marks, strict=True)]),
            "attention_mask": torch.tensor([put(p, [1] * len(t)) for p, t in zip(pads, tokens, strict=True)]),
        }

    expected = gradients(model, **batch("right"))
    for name, gradient in gradients(model, **batch("left")).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    places_found = prompts_of(model)
    assert places_found is not None
    packed = {
        "input_ids": torch.tensor([[t for prompt, reply in rows for t in prompt + reply]]),
        "labels": torch.tensor([[t for prompt, reply in rows for t in [-100] * len(prompt) + reply]]),
        "position_ids": torch.tensor([[n for prompt, reply in rows for n in range(len(prompt) + len(reply))]]),
    }
    for name, gradient in gradients(model, **packed, use_cache=False).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_saved_and_loaded_by_peft_alone_it_gives_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ids = torch.arange(16).view(2, 8) + 1
    labels = torch.where(torch.arange(8) < 5, -100, ids)
    model = with_reft(pico_model().to(dtype), intervention=kind, positions="f1+l2", layers=[0, 2]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico_model().to(dtype), tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).logits
        assert torch.equal(again(input_ids=ids, labels=labels).logits, expected)
    assert not (tmp_path / "adapter_model.bin").exists()
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(model(input_ids=ids, labels=labels).logits, expected)


@torch.no_grad()
def test_adapters_are_switched_disabled_deleted_and_unloaded(tmp_path: Path) -> None:
    ids = torch.arange(8)[None] + 1
    plain = pico_model()(input_ids=ids).logits
    model = with_reft(pico_model(), layers=[0], positions="last")
    one = model(input_ids=ids).logits
    model.add_adapter("other", ReftConfig(r=3, layers=[0, 2], positions="f2", intervention="direft"))
    assert torch.equal(model(input_ids=ids).logits, one)
    model.set_adapter("other")
    two = model(input_ids=ids).logits
    assert not torch.equal(two, one)
    assert not torch.equal(two, plain)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, one)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=ids).logits, one)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(model(input_ids=ids).logits, two)
    again = with_reft(pico_model(), layers=[1])
    again.load_adapter(tmp_path / "other", "third")
    again.set_adapter("third")
    assert torch.equal(again(input_ids=ids).logits, two)
    base = model.unload()
    assert torch.equal(base(input_ids=ids).logits, plain)
    assert not any(ReftModel.child in name.split(".") for name, _ in base.named_modules())
    with pytest.raises(ValueError, match="no weights can say"):
        again.merge_and_unload()


def test_trainable_parameters_are_those_of_the_papers_example() -> None:
    """Rank 4 at one layer of the shape of Llama-2-7B: 32,772, as pyreft's README prints."""
    with torch.device("meta"):
        model = pico_model(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32)
        reft = get_peft_model(model, ReftConfig(r=4, layers=[1], task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    assert reft.get_nb_trainable_parameters()[0] == 32_772


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": [3]}, "expected 0 to 2"),
        ({"layers": []}, "layers"),
        ({"r": 17}, "at most the hidden size"),
        ({"r": 0}, "at least 1"),
        ({"intervention": "lora"}, "expected one of loreft"),
        ({"component": "head"}, "expected one of block_output"),
        ({"positions": "first"}, "expected last, all"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_reft(pico_model(), **changes)


def test_training_without_labels_is_said(recwarn: pytest.WarningsRecorder) -> None:
    model = with_reft(pico_model()).train()
    with pytest.warns(UserWarning, match="without labels"):
        model(input_ids=torch.arange(6)[None])


# --- parity with pyreft 0.1.0, whose values lie beside the clone ------------------------------------------------------

CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()) if GOLDEN.is_dir() else []


def stories() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(REAL_DATA / "stories260k" / "hf", dtype=torch.float32)


def twenty_steps(model: Any, inputs: dict[str, Any], eps: float = 1e-8) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=eps, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", CASES or [pytest.param("", marks=pytest.mark.skip("no reference values here"))])
def test_parity_with_pyreft(name: str, tmp_path: Path) -> None:
    """Its logits within 1e-5, 20 steps of its losses within 1e-4, its logits after them within 1e-4; and back again.

    Where twenty steps in float32 end further than half of that from the same in float64, no two float32 computations
    can be asked to agree to 1e-4: there, it is twice that distance.
    """
    from safetensors.torch import load_file

    case = json.loads((GOLDEN / name / "case.json").read_text())
    tensors = load_file(GOLDEN / name / "tensors.safetensors")
    inputs = {"input_ids": tensors["input_ids"], "labels": tensors["labels"], "use_cache": False}
    model = from_pyreft(stories(), GOLDEN / name / "checkpoint").eval()
    assert model.peft_config["default"].positions == case["positions"]
    # what the base alone differs by between two processors is not the edits'
    with torch.no_grad(), model.disable_adapter():
        off = float((model(**inputs).logits - tensors["logits_base"]).abs().max())
    torch.testing.assert_close(model(**inputs).logits, tensors["logits"], rtol=0, atol=1e-5 + 2 * off)
    assert twenty_steps(model, inputs) == pytest.approx(case["losses"], rel=1e-4)
    wide = from_pyreft(stories(), GOLDEN / name / "checkpoint").eval().double()
    assert twenty_steps(wide, inputs) == pytest.approx(case["losses"], rel=1e-4)
    after = model(**inputs).logits
    rounding = float((after - wide(**inputs).logits).detach().abs().max())
    torch.testing.assert_close(after, tensors["logits_after_20_steps"], rtol=0, atol=max(1e-4, 2 * rounding))
    to_pyreft(model, tmp_path / "written")
    assert {p.name for p in (GOLDEN / name / "checkpoint").iterdir()} <= {
        p.name for p in (tmp_path / "written").iterdir()
    }
    again = from_pyreft(stories(), tmp_path / "written").eval()
    torch.testing.assert_close(again(**inputs).logits, after, rtol=0, atol=1e-5)


def test_parity_with_a_case_of_our_own(tmp_path: Path) -> None:
    """The same by values that infra/make_pyreft_values.py had pyreft compute: two spans of two layers."""
    from safetensors import safe_open

    with safe_open(Path(__file__).with_name("pyreft.safetensors"), framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (tmp_path / "config.json").write_text(about["config"])
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("checkpoint/"):
            _, stem, own = name.split("/")
            states.setdefault(stem, {})[own] = tensor
    for stem, state in states.items():
        torch.save(state, tmp_path / stem)
    base = pico_model(vocab_size=32, pad_token_id=None, tie_word_embeddings=True, max_position_embeddings=2048)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(tensors[f"base.{name}"])
    model = from_pyreft(base, tmp_path, positions=about["positions"]).eval()
    inputs = {"input_ids": tensors["ids"], "labels": tensors["labels"], "use_cache": False}
    torch.testing.assert_close(model(**inputs).logits, tensors["logits"], rtol=0, atol=1e-5)
    losses = twenty_steps(model, inputs, eps=1e-3)
    assert losses == pytest.approx(json.loads(about["losses"]), rel=1e-4)
    torch.testing.assert_close(model(**inputs).logits, tensors["logits_after"], rtol=0, atol=1e-4)


def test_folders_that_are_no_checkpoint_of_pyreft_are_refused(tmp_path: Path) -> None:
    model = with_reft(pico_model(), positions="f1+l2", layers=[0, 1])
    to_pyreft(model, tmp_path)
    state = from_pyreft(pico_model(), tmp_path)
    assert state.peft_config["default"].positions == "f1+l2"
    (tmp_path / "args.json").unlink()
    with pytest.raises(BadModel, match="does not say which positions"):
        from_pyreft(pico_model(), tmp_path)
    with pytest.raises(BadModel, match="does not fit this model"):
        from_pyreft(pico_model(hidden_size=32), tmp_path, positions="f1+l2")
    with pytest.raises(BadModel, match="does not fit this model"):
        from_pyreft(pico_model(num_hidden_layers=1), tmp_path, positions="f1+l2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intervention_types": ["<class 'os.system'>"]}))
    with pytest.raises(BadModel, match="not known here"):
        from_pyreft(pico_model(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadModel, match="is no checkpoint of pyreft"):
        from_pyreft(pico_model(), tmp_path)
