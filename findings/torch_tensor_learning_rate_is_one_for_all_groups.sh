#!/usr/bin/env bash
# PyTorch 2.13.0, 2.14.1: with a tensor as learning rate, all parameter groups of an optimizer hold the same tensor,
# and a scheduler that gives each group its own rate writes them one over another: every group trains at the rate of
# the last.
#
# Two groups; LambdaLR halves the rate of the first each step and leaves that of the second. Expected, and seen with
# lr=1.0: 0.5 and 1.0 after one step. Seen with lr=torch.tensor(1.0): 1.0 and 1.0, the halving is lost. With the order
# of the groups reversed both are halved. Writing to `param_groups[0]["lr"]` in place changes the second group too.
# A tensor is what torch.compile of the step and capturable optimizers ask for, so that a new rate is no new
# compilation; a rate of its own for embeddings, heads or LoRA's B (LoRA+) is the common use of groups. The
# documentation of AdamW allows a tensor with fused=True, as here, LambdaLR's takes a function for each group; neither
# says that they exclude each other. A tensor for each group, given in the groups, works.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import torch


def halve(step):
    return 0.5**step


def keep(step):
    return 1.0


def rates_after_a_step(factors, lr, own_tensors=False):
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in factors]
    groups = [{"params": [weight]} for weight in weights]
    if own_tensors:
        groups = [{**group, "lr": lr.clone()} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    optimizer.step()
    scheduler.step()
    for weight in weights:
        weight.grad = -torch.ones_like(weight)
    optimizer.step()
    return [round(weight[0].item(), 4) for weight in weights]


print(torch.__version__)
one = torch.tensor(1.0)
seen = {
    "a number": rates_after_a_step([halve, keep], 1.0),
    "a tensor": rates_after_a_step([halve, keep], one.clone()),
    "a tensor, groups reversed": rates_after_a_step([keep, halve], one.clone()),
    "a tensor for each group": rates_after_a_step([halve, keep], one.clone(), own_tensors=True),
}
for what, rates in seen.items():
    print(f"lr as {what}: the groups moved by {rates}")
assert list(seen.values()) == [[0.5, 1.0], [1.0, 1.0], [0.5, 0.5], [0.5, 1.0]], "not as it was seen"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
