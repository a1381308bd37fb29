"""Several adapters on one base in memory, compared bit for bit with a model that holds one of them alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.chat.adapter_pool import AdapterPool
from tasks.adapters.attach import attach, read_adapter
from tasks.core.errors import BadModel, BadParams
from tasks.models.loader import load_model
from tests.tasks.adapters.test_attach import ADAPTERS, logits
from tests.tasks.adapters.test_files import configure, published

KINDS = ("lora", "rslora", "dora", "loreft", "houlsby", "ia3", "oft")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def folders(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    found = {kind: published(pico_base, kind, place / kind) for kind in KINDS}
    for kind in ("lora", "dora", "loreft", "houlsby"):  # a second one of the same kind
        found[f"{kind} 2"] = published(pico_base, kind, place / f"{kind} 2")
        _double(found[f"{kind} 2"])
    return found


def _double(folder: Path) -> None:
    from safetensors.torch import save_file

    from tasks.adapters.files import WEIGHTS

    state = read_adapter(folder).state
    changed = {name: t if "magnitude" in name or name.endswith("rotation") else t * 1.5 for name, t in state.items()}
    save_file(changed, folder / WEIGHTS)


def resident_of(base: Path, dtype: torch.dtype, folders: dict[str, Path]) -> AdapterPool:
    resident = AdapterPool(load_model(base).to(dtype))  # type: ignore[arg-type]
    for name, folder in folders.items():
        resident.load(name, folder)
    return resident


@pytest.fixture(scope="module")
def alone(pico_base: Path, folders: dict[str, Path]) -> dict[tuple[str, str], torch.Tensor]:
    """The logits of every adapter on a base of its own, and of the bare base."""
    found = {}
    for kind, dtype in DTYPES.items():
        found[kind, ""] = logits(load_model(pico_base).to(dtype))  # type: ignore[arg-type]
        for name, folder in folders.items():
            found[kind, name] = logits(attach(load_model(pico_base).to(dtype), folder))  # type: ignore[arg-type]
    return found


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_is_the_model_with_that_adapter_alone(
    pico_base: Path, folders: dict[str, Path], alone: dict[tuple[str, str], torch.Tensor], dtype: str
) -> None:
    resident = resident_of(pico_base, DTYPES[dtype], folders)
    assert torch.equal(logits(resident.model), alone[dtype, ""])  # none is in use before it is asked for
    for _ in range(2):
        for name in folders:
            resident.use(name)
            assert torch.equal(logits(resident.model), alone[dtype, name]), name
            assert not any(p.requires_grad for p in resident.model.parameters())
            resident.off()
            assert torch.equal(logits(resident.model), alone[dtype, ""]), name


def test_adapters_differ(alone: dict[tuple[str, str], torch.Tensor]) -> None:
    """Else the tests here would show nothing."""
    found = list(alone.items())
    assert not any(torch.equal(a, b) for i, (k, a) in enumerate(found) for (j, b) in found[:i] if k[0] == j[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_swaps_drift_nothing(
    pico_base: Path, folders: dict[str, Path], alone: dict[tuple[str, str], torch.Tensor], dtype: str
) -> None:
    chosen = {name: folders[name] for name in ("lora", "lora 2", "dora", "loreft")}
    resident = resident_of(pico_base, DTYPES[dtype], chosen)
    for turn in range(10):
        name = list(chosen)[turn % 4]
        if turn % 4 == 3:
            resident.use(name)
        else:
            resident.merge(name)
        resident.use("lora")
        assert torch.equal(logits(resident.model), alone[dtype, "lora"])
    bare = load_model(pico_base).to(DTYPES[dtype])  # type: ignore[arg-type]
    assert same(state_of(resident.release()), state_of(bare))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "ia3", "oft"])
def test_unmerging_brings_every_bit_back(
    pico_base: Path, folders: dict[str, Path], alone: dict[tuple[str, str], torch.Tensor], dtype: str, name: str
) -> None:
    resident = resident_of(pico_base, DTYPES[dtype], {name: folders[name]})
    resident.use(name)
    before = state_of(resident.model)
    resident.merge(name)
    assert not same(state_of(resident.model), before)
    assert resident.kept_bytes > 0
    resident.unmerge()
    assert resident.kept_bytes == 0
    assert same(state_of(resident.model), before)
    assert torch.equal(logits(resident.model), alone[dtype, name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_the_merged_weights_are_those_of_peft_and_within_a_rounding_of_the_formula(
    pico_base: Path, folders: dict[str, Path], dtype: str, name: str
) -> None:
    resident = resident_of(pico_base, DTYPES[dtype], {name: folders[name]})
    resident.merge(name)
    theirs = attach(load_model(pico_base).to(DTYPES[dtype]), folders[name]).merge_and_unload()  # type: ignore[arg-type]
    assert torch.equal(logits(resident.model), logits(theirs))
    key = "model.layers.0.self_attn.q_proj"
    state = {
        n.removeprefix(f"base_model.model.{key}."): t.double() for n, t in read_adapter(folders[name]).state.items()
    }
    scale = 4.0 / 2**0.5 if name == "rslora" else 4.0 / 2  # alpha / sqrt(r), alpha / r
    expected = weight_of(load_model(pico_base).to(DTYPES[dtype]), key)  # type: ignore[arg-type]
    expected = expected + scale * (state["lora_B.weight"] @ state["lora_A.weight"])
    if name == "dora":  # equation 5 of the paper, with norms over rows of a weight of shape (out, in)
        expected = expected * (state["lora_magnitude_vector"] / expected.norm(dim=1))[:, None]
    merged = weight_of(resident.model, f"base_model.model.{key}.base_layer")
    rounding = 2 * torch.finfo(DTYPES[dtype]).eps  # of the sum, and of DoRA's norms
    torch.testing.assert_close(merged, expected, rtol=rounding, atol=1e-6)


def weight_of(model: Any, name: str) -> torch.Tensor:
    """One weight in float64."""
    weight: torch.Tensor = model.get_submodule(name).weight.detach().double()
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_swap_of_merged_adapters_is_a_fresh_merge(pico_base: Path, folders: dict[str, Path], dtype: str) -> None:
    pair = {name: folders[name] for name in ("lora", "lora 2", "dora")}
    swapped = resident_of(pico_base, DTYPES[dtype], pair)
    for name in ("lora", "dora", "lora", "lora 2"):
        swapped.merge(name)
    fresh = resident_of(pico_base, DTYPES[dtype], pair)
    fresh.merge("lora 2")
    assert same(state_of(swapped.model), state_of(fresh.model))
    assert torch.equal(logits(swapped.model), logits(fresh.model))


def test_what_is_kept_is_what_the_adapter_touches(pico_base: Path, folders: dict[str, Path]) -> None:
    resident = resident_of(pico_base, torch.bfloat16, {n: folders[n] for n in ("lora", "ia3")})
    assert resident.kept_bytes == 0
    resident.merge("lora")
    # two bytes each, two layers: q and o of 64 x 64, k and v of 32 x 64 (one of two heads), gate, up, down of 64 x 64
    assert resident.kept_bytes == 2 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 64)
    resident.merge("ia3")  # k, v and down
    assert resident.kept_bytes == 2 * 2 * (2 * 32 * 64 + 64 * 64)
    resident.off()
    assert resident.kept_bytes == 0


def test_a_load_in_between_leaves_what_is_merged_merged(pico_base: Path, folders: dict[str, Path]) -> None:
    resident = resident_of(pico_base, torch.bfloat16, {"lora": folders["lora"]})
    resident.merge("lora")
    before = logits(resident.model)
    for name in ("lora 2", "loreft"):
        resident.load(name, folders[name])
        assert (resident.active, resident.merged) == ("lora", "lora")
        assert torch.equal(logits(resident.model), before)


@pytest.mark.parametrize(
    ("name", "said"), [("loreft", "ReFT edits prompt tokens alone"), ("houlsby", "cannot be merged")]
)
def test_what_depends_on_the_input_is_switched_but_not_merged(
    pico_base: Path, folders: dict[str, Path], alone: dict[tuple[str, str], torch.Tensor], name: str, said: str
) -> None:
    resident = resident_of(pico_base, torch.float32, {name: folders[name]})
    with pytest.raises(BadModel, match=said) as caught:
        resident.merge(name)
    assert str(folders[name]) in str(caught.value)
    assert torch.equal(logits(resident.model), alone["fp32", name])


def test_prompts_of_their_own_can_be_switched(pico_base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Prefix tuning has no layers in the base: PEFT keeps it beside the model."""
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(load_model(pico_base), config).save_pretrained(tmp_path)
    resident = resident_of(pico_base, torch.float32, {"lora": folders["lora"], "prefix": tmp_path})
    expected = logits(attach(load_model(pico_base).float(), tmp_path))
    bare = logits(load_model(pico_base).float())
    for _ in range(2):
        resident.use("prefix")
        assert torch.equal(logits(resident.model), expected)
        resident.off()
        assert torch.equal(logits(resident.model), bare)
        resident.use("lora")
    resident.use("prefix")
    with pytest.raises(BadModel, match="cannot be merged"):
        resident.merge("prefix")


def test_what_does_not_fit_leaves_the_others_as_they_were(
    pico_base: Path, folders: dict[str, Path], alone: dict[tuple[str, str], torch.Tensor], tmp_path: Path
) -> None:
    resident = resident_of(pico_base, torch.float32, {"lora": folders["lora"], "loreft": folders["loreft"]})
    resident.use("lora")
    bad_layer, bad_shape = (published(pico_base, kind, tmp_path / kind) for kind in ("loreft", "lora"))
    configure(bad_layer, layers=[9])
    configure(bad_shape, r=3)
    for folder in (bad_layer, bad_shape):
        with pytest.raises(BadModel):
            resident.load("bad", folder)
        assert torch.equal(logits(resident.model), alone["fp32", "lora"])
    with pytest.raises(BadParams, match="there is no such adapter"):
        resident.use("bad")
    for name in ("loreft", "lora"):
        resident.use(name)
        assert torch.equal(logits(resident.model), alone["fp32", name])


def test_names_are_of_one_adapter_each(pico_base: Path, folders: dict[str, Path]) -> None:
    resident = resident_of(pico_base, torch.float32, {"lora": folders["lora"]})
    with pytest.raises(BadParams, match="of this name already"):
        resident.load("lora", folders["loreft"])
    with pytest.raises(BadParams, match="expected: lora"):
        resident.use("nothing")


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"modules_to_save": ["norm"]},  # PEFT leaves its copy in the base
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_adapters_that_take_a_part_out_of_the_base_are_refused(
    pico_base: Path, folders: dict[str, Path], tmp_path: Path, changes: dict[str, object]
) -> None:
    configure(published(pico_base, "lora", tmp_path), **changes)
    resident = resident_of(pico_base, torch.float32, {"lora": folders["lora"]})
    with pytest.raises(BadModel, match="changes the base itself"):
        resident.load("other", tmp_path)


def test_a_quantized_base_is_switched_but_not_merged(pico_base: Path, folders: dict[str, Path]) -> None:
    from tasks.adapters.params import QloraAdapter
    from tests.helpers.samples import QLORA

    adapter = QloraAdapter.model_validate(QLORA)
    resident = AdapterPool(load_model(pico_base, adapter.base_quantization))
    resident.load("lora", folders["lora"])
    resident.use("lora")
    assert torch.equal(
        logits(resident.model), logits(attach(load_model(pico_base, adapter.base_quantization), folders["lora"]))
    )
    with pytest.raises(BadModel, match="rounded away in a quantized base"):
        resident.merge("lora")


def test_a_merge_into_tied_weights_is_refused(pico_base: Path, tmp_path: Path) -> None:
    """PEFT would change the head with the embeddings: the merged model would be another one."""
    from peft import LoraConfig, get_peft_model

    model = load_model(pico_base)
    assert model.config.tie_word_embeddings
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path)
    resident = AdapterPool(load_model(pico_base))
    resident.load("embedded", tmp_path)
    with pytest.raises(BadModel, match="share their weights"):
        resident.merge("embedded")
    resident.off()
    assert torch.equal(logits(resident.model), logits(load_model(pico_base)))


def test_an_adapter_with_embeddings_of_its_own_is_refused(
    pico_base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = load_model(pico_base)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path)
    resident = resident_of(pico_base, torch.bfloat16, {"lora": folders["lora"]})
    with pytest.raises(BadModel, match="changes the base itself") as caught:
        resident.load("other", tmp_path)
    assert "embed_tokens.base_layer.weight: not the weights of this base" in str(caught.value)


def biased(pico_base: Path, folder: Path) -> Path:
    """A pico Qwen 2, of whose projections q, k and v have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=load_model(pico_base).config.vocab_size, **shape))
    model.save_pretrained(folder)
    return folder


def test_an_adapter_with_biases_of_layers_that_are_no_targets_is_refused(pico_base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = biased(pico_base, tmp_path / "base")
    for number, trained in enumerate((0.0, 1.0)):
        model: Any = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["o_proj"], bias="all"))
        with torch.no_grad():
            model.get_base_model().model.layers[1].self_attn.k_proj.bias += trained
        model.save_pretrained(tmp_path / str(number))
    bare = load_model(base)
    resident = AdapterPool(load_model(base))
    resident.load("trained none", tmp_path / "0")
    assert same(state_of(resident.release()), state_of(bare))
    with pytest.raises(BadModel, match="changes the base itself") as caught:
        resident.load("trained", tmp_path / "1")
    assert caught.value.examples == (
        "base_model.model.model.layers.1.self_attn.k_proj.bias: not the weights of this base",
    )
    assert same(state_of(resident.release()), state_of(bare))


def test_a_base_that_had_a_trained_prompt_counts_positions_as_it_did(
    pico_base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Also after many swaps, and after an adapter that did not fit."""
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for name in ("prompt", "bad"):
        get_peft_model(load_model(pico_base), config).save_pretrained(tmp_path / name)
    configure(tmp_path / "bad", num_virtual_tokens=4)
    ids = torch.arange(3, 23).view(2, 10)
    padded = (torch.arange(10) >= torch.tensor([[4], [0]])).long()
    base = load_model(pico_base).float()
    bare = base(ids, attention_mask=padded).logits
    resident = AdapterPool(base)
    resident.load("prompt", tmp_path / "prompt")
    resident.load("lora", folders["lora"])
    with pytest.raises(BadModel, match="adapter tensors match"):
        resident.load("bad", tmp_path / "bad")
    for _ in range(2):
        resident.use("prompt")
        assert len(base._forward_pre_hooks) == 1
        resident.use("lora")
        assert not base._forward_pre_hooks
        resident.use("prompt")
    assert torch.equal(resident.release()(ids, attention_mask=padded).logits, bare)


def test_with_a_trained_prompt_tokens_may_be_given_by_place(pico_base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(load_model(pico_base), config).save_pretrained(tmp_path)
    attach(base := load_model(pico_base).float(), tmp_path)
    ids = torch.arange(3, 23).view(2, 10)
    padded = (torch.arange(10) >= torch.tensor([[4], [0]])).long()
    by_name = base(input_ids=ids, attention_mask=padded).logits
    assert torch.equal(base(ids, padded).logits, by_name)
    assert torch.equal(base(ids, attention_mask=padded).logits, by_name)
    # without padding the same tokens have the same positions
    alone = base(ids[:1, 4:]).logits
    torch.testing.assert_close(by_name[:1, 4:], alone)


def test_every_kind_of_the_family_is_tried() -> None:
    assert set(KINDS) <= set(ADAPTERS)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_a_change_waits_for_the_pass_that_it_would_change(
    pico_base: Path, folders: dict[str, Path], alone: dict[tuple[str, str], torch.Tensor]
) -> None:
    """In the middle of a pass another thread wants another adapter, or none: it gets it when the pass is over."""
    resident = resident_of(pico_base, torch.float32, {name: folders[name] for name in ("lora", "lora 2", "loreft")})
    changes: list[Callable[[], Any]] = [
        lambda: resident.use("lora 2"),  # PEFT switches it in the same layers
        lambda: resident.use("loreft"),  # takes the layers out
        resident.off,
        lambda: resident.merge("lora"),
        resident.release,
    ]
    for change in changes:
        with ThreadPoolExecutor(1) as other:
            started: list[Any] = []

            def meddle(*_: Any, change: Any = change, other: Any = other, started: Any = started) -> None:
                started.append(other.submit(change))
                with pytest.raises(TimeoutError):
                    started[0].result(0.1)

            with resident.using("lora") as model:
                handle = model.get_base_model().model.layers[1].register_forward_pre_hook(meddle)  # type: ignore[operator]
                given = logits(model)
                handle.remove()
                assert resident.active == "lora"
            started[0].result(10)
        torch.testing.assert_close(given, alone["fp32", "lora"], rtol=0, atol=1e-5)  # at the end it is merged
        resident.off()


def test_threads_that_want_different_adapters_each_get_their_own(
    pico_base: Path, folders: dict[str, Path], alone: dict[tuple[str, str], torch.Tensor]
) -> None:
    wanted = ["lora", "lora 2", "loreft", "ia3"] * 6
    resident = resident_of(pico_base, torch.float32, {name: folders[name] for name in set(wanted)})

    def ask(name: str) -> torch.Tensor:
        with resident.using(name) as model:
            return logits(model)

    with ThreadPoolExecutor(8) as threads:
        for name, given in zip(wanted, threads.map(ask, wanted), strict=True):
            assert torch.equal(given, alone["fp32", name]), name


def test_a_change_within_a_block_that_uses_an_adapter_is_refused(pico_base: Path, folders: dict[str, Path]) -> None:
    resident = resident_of(pico_base, torch.float32, {name: folders[name] for name in ("lora", "lora 2")})
    with resident.using("lora"), resident.using("lora"), resident.in_use():
        for change in (resident.off, resident.release, resident.unmerge):
            with pytest.raises(BadParams, match="within a block that uses one"):
                change()
        with pytest.raises(BadParams, match="use, while lora is in use"), resident.using("lora 2"):
            pass
    with pytest.raises(BadParams, match="no such adapter"), resident.using("another"):
        pass
    with resident.using("lora 2"):
        assert resident.active == "lora 2"
