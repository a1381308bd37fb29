"""ReFT where no code of ours stands in between: TRL's trainer, lm-eval, a 4-bit base, torch.compile, autocast."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.adapters.params import QloraAdapter
from tasks.adapters.reft import ReftConfig
from tasks.adapters.reft.prompt_positions import Prompts, prompts_of
from tasks.models.loader import load_model
from tests.helpers.samples import QLORA

CONFIG: dict[str, Any] = {"r": 2, "layers": [0, 1], "positions": "f1+l2", "task_type": "CAUSAL_LM"}


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def moved(model: Any) -> Any:
    """With edits that show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "source" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def test_trl_trains_it_and_its_labels_tell_the_prompts(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer: Any = AutoTokenizer.from_pretrained(pico_base)
    rows: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": f"say {n} " + "x" * n}],
            "completion": [{"role": "assistant", "content": f"it is {n}"}],
        }
        for n in range(4)
    ]
    asked = [
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"])
        for row in rows
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        save_strategy="no",
        disable_tqdm=True,
    )
    seen: list[list[int]] = []
    find = Prompts._find

    def spy(self: Prompts, *args: Any) -> None:
        find(self, *args)
        prompts = self._pass.prompts
        seen.append(sorted(prompts.length.tolist()) if prompts else [])

    monkeypatch.setattr(Prompts, "_find", spy)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ReFT trains without labels")
        trainer = SFTTrainer(
            model=base_of(pico_base),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=ReftConfig(**CONFIG),
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
    assert seen == [sorted(asked)] * 2
    after = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    still = [name for name, tensor in before.items() if torch.equal(after[name], tensor)]
    assert all("layers.1.reft.reft_edits.default.first" in name for name in still)  # nothing above sees those
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(base_of(pico_base), tmp_path / "saved")
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_lm_eval_generates_with_it(pico_base: Path, tmp_path: Path) -> None:
    """Through `peft=`, two prompts of different length in a batch, against `generate` one at a time."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = moved(get_peft_model(base_of(pico_base), ReftConfig(**CONFIG)))
    model.save_pretrained(tmp_path)
    engine = HFLM(pretrained=str(pico_base), peft=str(tmp_path), dtype="float32", device="cpu", batch_size=2)
    asked = ["What is 2 plus 3?", "Say it again, and then once more, please"]
    options = {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(text, dict(options)), idx=n)
        for n, text in enumerate(asked)
    ]
    found = engine.generate_until(requests, disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(pico_base)
    for text, answer in zip(asked, found, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_it_trains_on_a_four_bit_base(pico_base: Path) -> None:
    model: Any = get_peft_model(
        load_model(pico_base, QloraAdapter.model_validate(QLORA).base_quantization), ReftConfig(**CONFIG)
    ).train()
    ids = torch.arange(5, 25).view(2, 10)
    labels = torch.where(torch.arange(10) < 6, -100, ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_compiled_and_under_autocast_it_is_the_same_model(pico_base: Path) -> None:
    model = moved(get_peft_model(base_of(pico_base), ReftConfig(**CONFIG)))
    ids = torch.arange(5, 25).view(2, 10)
    labels = torch.where(torch.arange(10) < 6, -100, ids)
    plain = model(input_ids=ids, labels=labels, use_cache=False)
    run: Any = torch.compile(model, backend="eager")
    compiled = run(input_ids=ids, labels=labels, use_cache=False)
    torch.testing.assert_close(compiled.logits, plain.logits, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(input_ids=ids, labels=labels, use_cache=False)
    torch.testing.assert_close(cast.logits.float(), plain.logits, rtol=0.1, atol=0.1)
    assert prompts_of(model) is not None
