#!/usr/bin/env bash
# PyTorch 2.13.0: `torch.optim.Adafactor` with its default eps scales its step by the gradient once the weights are
# bf16 and the gradients small: it is then no adaptive optimizer any more, and its steps are hundreds of times too
# small.
#
# Weights of zero, gradients from a normal distribution times s, one step. Expected: the same size of step for every
# s, which is what Adafactor is for and what float32 weights get down to s = 1e-5 and below. Seen with bf16 weights:
# the same down to 1e-2, an eighth at 1e-3, an eightieth at 1e-4, less than an eight-hundredth at 1e-5. The cause is
# no rounding: eps=(1e-30, 1e-3) in bf16 gives full steps for every s.
# The default eps is (None, 1e-3); None becomes torch.finfo(weight dtype).eps, 0.0078 in bf16, and bounds the root of
# the second moment from below. The documentation calls it a term for numerical stability and does not say what None
# becomes.
# Gradients of a language model's weights are commonly 1e-3 and less: whoever moves a run from float32 to bf16 weights
# keeps a loss curve that falls too slowly, and no warning.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import torch


def step_size(dtype, scale, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = torch.optim.Adafactor([weight], lr=1e-2, weight_decay=0.0, **options)
    weight.grad = (torch.randn(64, 64, generator=generator) * scale).to(dtype)
    optimizer.step()
    return weight.detach().double().square().mean().sqrt().item()


print(torch.__version__)
full = step_size(torch.float32, 1.0)
ratios = {}
for scale in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
    ratios[scale] = step_size(torch.bfloat16, scale) / full
    print(f"gradients of {scale:g}: the step in bf16 is {ratios[scale]:.5f} of what it is for large gradients")
    assert abs(step_size(torch.float32, scale) / full - 1) < 0.01
    assert abs(step_size(torch.bfloat16, scale, eps=(1e-30, 1e-3)) / full - 1) < 0.02
assert abs(ratios[1e-2] - 1) < 0.02
assert 0.11 < ratios[1e-3] < 0.14 and 0.011 < ratios[1e-4] < 0.014 and ratios[1e-5] < 0.0014, "not as it was seen"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
