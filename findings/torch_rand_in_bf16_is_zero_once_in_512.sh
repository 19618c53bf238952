#!/usr/bin/env bash
# PyTorch 2.13.0 and 2.14.1 on a CPU: `torch.rand` in bf16 is exactly 0.0 once in 512 numbers (fp16: once in 4096),
# though numbers as small as 1e-6 are drawn beside it: what would be rounded up to 1.0 is given out as 0.0.
#
# Expected: a zero as rarely as in float32 (once in 16 million), or, were the numbers multiples of 1/256, once in 256
# and nothing between 0 and 1/256. Seen in 4 million numbers: 0.2 % zeros and 0.1 % others below 1/1024. A mask `rand
# < 0.001` takes 0.30 %, three times as many as asked; `-log(rand)` is infinite once in 512, and with it
# exponential and Gumbel noise made by hand.
# uniform_(-1, 1) likewise gives -1 for what would have been 1. The documentation promises numbers from [0, 1), which
# this keeps.
# `torch.rand_like(hidden)` in a bf16 model is how drop masks, noise and the times of diffusion language models (1 /
# t) are drawn; draw in float32 instead.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import torch


def shares(dtype):
    torch.manual_seed(0)
    numbers = torch.rand(1 << 22, dtype=dtype)
    small = (numbers < 2**-10) & (numbers > 0)
    noise = -numbers.log()
    return [mask.double().mean().item() for mask in (numbers == 0, small, numbers < 0.001, noise.isinf())]


print(torch.__version__)
seen = {dtype: shares(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
for dtype, (zero, small, masked, infinite) in seen.items():
    print(f"{dtype}: zero {zero:.4%}, from there to 1/1024 {small:.4%}, below 0.001 {masked:.4%}, inf {infinite:.4%}")
zero, small, masked, infinite = seen[torch.bfloat16]
assert seen[torch.float32][0] < 1e-5 and 0.0009 < seen[torch.float32][2] < 0.0011
assert abs(seen[torch.float16][0] * 4096 - 1) < 0.2, "not as it was seen"
assert abs(zero * 512 - 1) < 0.05 and infinite == zero, "not as it was seen"
assert 0.0009 < small < 0.0011 and 0.0027 < masked < 0.0031, "not as it was seen"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
