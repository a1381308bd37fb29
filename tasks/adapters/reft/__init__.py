"""ReFT as a method of PEFT: low-rank edits of hidden states at prompt tokens (Wu et al. 2024, arXiv:2404.03592).

    from tasks.adapters.reft import ReftConfig
    model = get_peft_model(base, ReftConfig(r=8, positions="f7+l7", task_type="CAUSAL_LM"))

The base model stays as it is; tokens that are generated later see the edits through attention. Fewer parameters than
any LoRA; on arithmetic the paper finds it behind LoRA (table 2: 42.6 against 46.9 on LLaMA-7B), on commonsense
reasoning ahead (table 1: 80.2 against 74.7). Importing this module makes the method known to PEFT.

The equations are in `interventions`, where prompts are in `prompt_positions`, PEFT's side in `tuner`, pyreft's files in
`pyreft_format`, and what a training computes only once in `tasks.inference.frozen_layer_cache`.
"""

from tasks.adapters.reft.pyreft_format import from_pyreft, to_pyreft
from tasks.adapters.reft.tuner import ReftConfig, ReftLayer, ReftModel

__all__ = ["ReftConfig", "ReftLayer", "ReftModel", "from_pyreft", "to_pyreft"]
