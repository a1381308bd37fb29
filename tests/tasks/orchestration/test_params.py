from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.errors import BadParams
from tasks.orchestration.params import load_params
from tests.conftest import ROOT

QUICKSTART = """\
ingest:
  sources:
    chats: {kind: generator, path: data/lexicon.yaml}
validate:
  max_turns: 32
base:
  kind: local
  path: models/tiny
render:
  held_out: 0.1
train_defaults:
  micro_batch_size: 32
train:
  qlora:
    adapter:
      name: qlora
      rank: 16
      targets: all-linear
    objective:
      name: sft
    epochs: 1
    learning_rate: 3.0e-3
  reft:
    adapter:
      name: loreft
    objective:
      name: sft
merge: {}
evaluate:
  suites: {}
register:
  model: temper-tiny
promote:
  suite: held_out
  floors: {}
"""
"""Some of everything."""


def problems(tmp_path: Path, text: str) -> BadParams:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(BadParams) as caught:
        load_params(path)
    assert caught.value.exit_code == 65
    return caught.value


def line_of(text: str, part: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if part in line)


def test_the_quickstart_loads(tmp_path: Path) -> None:
    params = load_params(ROOT / "recipes" / "quickstart.yaml")
    assert list(params.train) == ["qlora", "orpo", "reft"]
    assert params.train["orpo"].objective.name == "orpo"


def test_a_misspelt_key_names_the_nearest_one_and_its_line(tmp_path: Path) -> None:
    text = QUICKSTART.replace("max_turns:", "max_turn:")
    error = problems(tmp_path, text)
    assert error.examples == (
        f'line {line_of(text, "max_turn:")}: validate.max_turn: unknown key; did you mean "max_turns"?',
    )


def test_all_errors_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = (
        QUICKSTART.replace("max_turn", "max_trun", 1)
        .replace("rank: 16", "rank: 0", 1)
        .replace("kind: local", "kind: locl")
    )
    error = problems(tmp_path, text)
    told = "\n".join(error.examples)
    assert len(error.examples) == 3
    assert 'did you mean "max_turns"' in told
    assert "train.qlora.adapter.rank: Input should be greater than or equal to 1, or: Input should be a valid" in told
    assert "base" in told
    assert "locl" in told


NAMES = (
    "full, lora, rslora, dora, qlora, lora8bit, adalora, ia3, prompt_tuning, p_tuning, prefix, p_tuning_v2, "
    "loreft, noreft, consreft, lobireft, direft, nodireft, bottleneck, peft"
)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("      name: qlora\n", "", f"train.qlora.adapter.name: is missing; one of: {NAMES}"),
        (
            "      name: qlora\n",
            "      name: qlroa\n",
            f"train.qlora.adapter.name: is unknown; got 'qlroa'; did you mean \"qlora\"? One of: {NAMES}",
        ),
        (
            "      name: qlora\n",
            "      name: zzz\n",
            f"train.qlora.adapter.name: is unknown; got 'zzz'; one of: {NAMES}",
        ),
        (
            "      name: sft\n",
            "      names: sft\n",
            "train.qlora.objective.name: is missing; one of: sft, orpo, dpo, simpo, kto",
        ),
        ("  kind: local", "  kin: local", "base.kind: is missing; one of: local, hub, checkpoint, pretrain, continue"),
        ("      rank: 16\n", "      ranks: 16\n", 'train.qlora.adapter.ranks: unknown key; did you mean "rank"?'),
        (
            "      rank: 16\n",
            "      rank: 16\n      ranks: 16\n",
            'train.qlora.adapter.ranks: unknown key; the nearest known one is "rank", which is given too',
        ),
        ("      rank: 16\n", "      rank: 16\n      zzz: 16\n", "train.qlora.adapter.zzz: unknown key"),
    ],
)
def test_a_wrong_name_or_key_is_told_with_those_that_are_known(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in QUICKSTART
    (example,) = problems(tmp_path, QUICKSTART.replace(old, new, 1)).examples
    assert example.partition(": ")[2] == said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("targets: all-linear", 'targets: ""', "train.qlora.adapter.targets: String should have at least 1 character"),
        ("targets: all-linear", 'targets: [""]', "train.qlora.adapter.targets.0: String should have at least 1"),
        ("learning_rate: 3.0e-3", "learning_rate: .nan", "learning_rate"),
        ("learning_rate: 3.0e-3", "learning_rate: abc", "should be a valid number"),
        ("learning_rate: 3.0e-3", "learning_rate: -1.0", "greater than 0"),
        ("epochs: 1", "epochs: 1.5", "valid integer"),
        ("epochs: 1", "epochs: 0", "greater than or equal to 1"),
        ("name: sft", "name: no", "objective"),
        ("held_out: 0.1", "held_out: 1.1", "less than or equal to 1"),
        ("  qlora:\n    adapter", "  QLoRA now:\n    adapter", "train.QLoRA now"),
        ("  qlora:\n    adapter", "  base:\n    adapter", "base"),
        ("model: temper-tiny", "model: a/b", "register.model"),
        ("model: temper-tiny", 'model: "champion\\n"', "register.model"),
    ],
)
def test_a_wrong_value_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in QUICKSTART
    assert said in "\n".join(problems(tmp_path, QUICKSTART.replace(old, new, 1)).examples)


def test_numbers_as_yaml_1_2_reads_them(tmp_path: Path) -> None:
    """YAML 1.1 takes 3e-3 for text; DVC reads 1.2, and so do we."""
    path = tmp_path / "params.yaml"
    path.write_text(QUICKSTART.replace("learning_rate: 3.0e-3", "learning_rate: 3e-3", 1))
    assert load_params(path).train["qlora"].learning_rate == 0.003


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ingest:\n\tsources: 1\n", ":2:1"),
        ("ingest:\n  sources: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: !!python/object/apply:os.system ['true']\n", "tag is not allowed"),
        ("a: &x [1]\nb: *x\n", "alias is not allowed"),
        ("- 1\n", "no sections"),
        ("", "no sections"),
    ],
)
def test_what_is_not_plain_yaml_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in str(problems(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="cannot be read"):
        load_params(tmp_path / "nothing.yaml")


def test_the_gate_names_only_suites_that_are_asked(tmp_path: Path) -> None:
    text = QUICKSTART.replace("suite: held_out", "suite: heldout", 1).replace(
        "floors: {}", "floors: {gsm8k: 0.5, held_out: 0.1}", 1
    )
    error = problems(tmp_path, text)
    assert error.examples == (
        f'line {line_of(text, "suite: heldout")}: promote.suite: no suite "heldout" is asked; did you mean "held_out"?',
        f'line {line_of(text, "floors:")}: promote.floors: no suite "gsm8k" is asked; there are: held_out',
    )


def test_an_unknown_ready_suite_is_told_when_params_are_read(tmp_path: Path) -> None:
    suite = "{kind: ready, name: gsm8, data: x, missing: skip, limit: none, chat_template: false}"
    text = QUICKSTART.replace("suites: {}", f"suites: {{mine: {suite}}}", 1)
    (told,) = problems(tmp_path, text).examples
    assert told.startswith(f"line {line_of(text, 'suites:')}: evaluate.suites.mine.name: ")
    assert 'no suite "gsm8" is shipped; did you mean "gsm8k"?' in told


@pytest.mark.parametrize("name", ["champion", "base"])
def test_a_reserved_name_of_a_method_is_told_with_its_line(tmp_path: Path, name: str) -> None:
    text = QUICKSTART.replace("\n  reft:\n", f"\n  {name}:\n", 1)
    (told,) = problems(tmp_path, text).examples
    assert told.startswith(f"line {line_of(text, f'  {name}:')}: train.{name}: ")
    assert "call the method otherwise" in told


def test_a_method_is_laid_over_what_methods_share(tmp_path: Path) -> None:
    """A method's own value wins; single keys of adapter and objective are shared only under the same name."""
    path = tmp_path / "params.yaml"
    adapter = "{name: lora, rank: 4, dropout: 0.1}"
    shared = f"train_defaults: {{epochs: 3, batch_size: 64, adapter: {adapter}, schedule: {{wsd: 0.5}}}}"
    methods = "train: {a: {epochs: 1, adapter: {rank: 8}}, b: {adapter: {name: dora, rank: 2}, schedule: linear}, c: }"
    path.write_text(f"{SMALLEST}{shared}\n{methods}\n")
    a, b, c = load_params(path).train.values()
    assert (a.epochs, a.batch_size, a.adapter.model_dump()["dropout"], a.adapter.model_dump()["rank"]) == (
        1,
        64,
        0.1,
        8,
    )
    assert (b.epochs, b.adapter.name, b.adapter.model_dump()["dropout"], b.schedule) == (3, "dora", 0.0, "linear")
    assert (c.adapter.name, c.adapter.model_dump()["rank"]) == ("lora", 4)
    assert c.schedule.model_dump() == {"wsd": 0.5}  # type: ignore[union-attr]


SMALLEST = "ingest: {sources: {mine: {kind: file, path: my.jsonl}}}\nbase: {kind: local, path: models/tiny}\n"


def test_what_is_wrong_in_shared_values_is_told_once_and_at_their_line(tmp_path: Path) -> None:
    error = problems(tmp_path, f"{SMALLEST}train_defaults:\n  epoch: 3\n  seed: -1\ntrain: {{a: {{}}, b: {{}}}}\n")
    assert error.examples == (
        'line 4: train_defaults.epoch: unknown key; did you mean "epochs"?',
        "line 5: train_defaults.seed: Input should be greater than or equal to 0; got -1",
    )


@pytest.mark.parametrize(
    ("adapter", "rate"), [("qlora", 2e-4), ("full", 2e-5), ("loreft", 9e-4), ("ia3", 3e-3), ("bottleneck", 1e-4)]
)
def test_the_learning_rate_is_what_is_usual_for_the_adapter(tmp_path: Path, adapter: str, rate: float) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"{SMALLEST}train: {{a: {{adapter: {{name: {adapter}}}}}}}\n")
    method = load_params(path).train["a"]
    assert method.learning_rate == rate
    assert (method.batch_size, method.micro_batch_size) == (32, 8)
