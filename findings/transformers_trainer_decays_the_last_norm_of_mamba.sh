#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): the Trainer's weight decay reaches the weight of the last RMS norm of Mamba, and
# its A_log and D, though its rule is that norms and biases are left alone.
#
# A Mamba model, TrainingArguments(weight_decay=0.1). Expected: every norm in the group without decay. Seen:
# `norm_f.weight` is decayed, `layers.0.norm.weight` is not; `A_log` and `D`, which the Mamba paper's code marks as
# not to be decayed, are. Of a GPT-2, whose last norm is `ln_f`, no norm is decayed.
# Norms are known by the class nn.LayerNorm and by patterns on names, `norm` between dots or at the end after `_`: an
# RMS norm of another name is a weight like others. The docstring of get_decay_parameter_names says "or variation of
# 'norm'". The same in mamba2, falcon_mamba, nemotron_h and xlstm, whose norms are called norm_f or norm_mlstm, with
# no message: look at the groups of a new model type before a long run with decay, and name your own norms `…_norm`.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/show.py" <<'PYTHON'
import sys
import warnings

warnings.simplefilter("ignore")

import torch
import transformers


def decayed(config):
    model = transformers.AutoModelForCausalLM.from_config(config)
    arguments = transformers.TrainingArguments(output_dir=sys.argv[1], weight_decay=0.1, use_cpu=True, report_to=[])
    optimizer = transformers.Trainer(model=model, args=arguments).create_optimizer()
    groups = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: groups[id(p)] > 0 for name, p in model.named_parameters()}


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
mamba = decayed(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))
gpt2 = decayed(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
print("mamba, decayed:", [name for name, is_decayed in mamba.items() if is_decayed])
print("mamba, not decayed:", [name for name, is_decayed in mamba.items() if not is_decayed])
assert not any(is_decayed for name, is_decayed in gpt2.items() if ".ln_" in name)
assert not mamba["backbone.layers.0.norm.weight"] and not mamba["backbone.layers.0.mixer.conv1d.bias"]
for name in ("backbone.norm_f.weight", "backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D"):
    assert mamba[name], f"not as it was seen: {name}"
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder/output"
