#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU: `torch.optim.SGD(fused=True)` does not write bf16 and fp16 weights back; only the few
# elements after the last whole vector of a tensor move. Mended in 2.14.1.
#
# A weight of 70 ones with gradients of one, lr 0.1, one step. Expected: 70 elements near 0.9, as with fused=False.
# Seen: the first 64 are still 1.0, the last six are 0.8984; with momentum the momentum buffer is filled and the
# weight stays. In float32 all 70 move. The documentation of `fused` lists bf16 and fp16 as supported, and as the
# faster way to the same numbers.
# A weight whose size is a multiple of the vector, which is nearly every weight of a language model, is never trained:
# the loss moves by the norms and biases of other dtypes alone, or stays flat, and the learning rate gets the blame.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import torch


def step(dtype, fused, **options):
    weight = torch.nn.Parameter(torch.ones(70, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused, **options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return weight.detach(), optimizer.state[weight].get("momentum_buffer")


print(torch.__version__)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    plain, _ = step(dtype, fused=False)
    for options in ({}, {"momentum": 0.9}):
        fused, momentum = step(dtype, fused=True, **options)
        unmoved = (fused == 1).sum().item()
        print(f"{dtype}, {options or 'no momentum'}: {unmoved} of 70 unmoved, first {fused[0]}, last {fused[-1]}")
        assert (plain < 0.91).all() and fused[-1] < 0.91
        assert unmoved == (0 if dtype == torch.float32 else 64), "not as it was seen"
        assert momentum is None or (momentum == 1).all()
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
