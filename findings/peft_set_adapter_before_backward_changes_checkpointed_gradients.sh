#!/usr/bin/env bash
# PEFT 0.21.2 (transformers 5.24.0, torch 2.13.0): with gradient checkpointing, `set_adapter` between forward and
# backward makes the backward of the first adapter's loss run through the second adapter: wrong gradients, and no
# error.
#
# Two LoRA adapters of the same shape; the loss is computed with the first, `set_adapter("second")` follows, then
# backward.
# Expected: the gradients that the same calls give without checkpointing, or checkpointing's error about a changed
# recomputation.
# Seen: the first adapter does get gradients, of a plausible size (norm 0.74 for 0.64), but single ones are off by
# more than their own size. The loss is the same. Without the switch, checkpointed and plain gradients agree.
# The layers are run again in backward, and look the active adapter up then; both adapters save tensors of the same
# shapes, which is all that torch's check compares. torch.utils.checkpoint warns of functions that depend on global
# state; PEFT's set_adapter, set_requires_grad and gradient_checkpointing_enable say nothing. Whoever trains two
# adapters in a step, or looks at another adapter between a loss and its backward (a reference policy, a sample), is
# concerned: go back to the first one before backward.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")

import peft
import torch
import transformers


def gradients(checkpointing, switch):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora, adapter_name="first")
    model.add_adapter("second", lora)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    both = ["first", "second"]
    model.set_adapter("first")
    model.set_requires_grad(both)
    tokens = torch.arange(12).view(1, 12)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    if switch:
        model.set_adapter("second")
        model.set_requires_grad(both)
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if ".first." in name}
    assert all(gradient is not None for gradient in named.values())
    return loss.item(), named


print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
right_loss, right = gradients(checkpointing=False, switch=False)
for checkpointing, switch in ((False, True), (True, False), (True, True)):
    loss, seen = gradients(checkpointing, switch)
    off = max(((seen[name] - right[name]).norm() / right[name].norm()).item() for name in right)
    norm = torch.nn.utils.get_total_norm(list(seen.values())).item()
    print(f"checkpointing {checkpointing}, switch {switch}: norm {norm:.4f}, worst gradient off by {off:.3f}")
    assert abs(loss - right_loss) < 1e-5
    assert (off > 0.5) if checkpointing and switch else (off < 1e-4), "not as it was seen"
PYTHON
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py"
