#!/usr/bin/env bash
# PyTorch 2.13.0 and 2.14.1 on a CPU: the fused kernel of scaled_dot_product_attention gives a query whose mask is the
# lowest number of the dtype everywhere gradients as many times too large as there are keys. Its output is right.
#
# Row 3 of the mask is torch.finfo(float32).min in all of 64 columns. Expected: the gradients of the math backend,
# whose row is a plain mean of the values, as the fused kernel's is. Seen: those of query, key and value 64 times as
# large; 8 times with 8 keys; with -1e9 likewise. With -1e4, or -inf (all gradients zero), both backends agree;
# sdpa_kernel([MATH]) is right.
# The saved log-sum of the row is min + log(64), which is min in float32, so that each probability is 1 when it is
# made again.
# Masks of the lowest number are common for padding, and a left-padded row masks some queries fully: harmless while
# nothing is learnt from those rows, and not where a loss or a pooling sees them. The documentation speaks of
# differences by the nature of floating-point numbers, and says that the fused kernels are for CUDA alone.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def row_and_gradients(backend, length, masked):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 2, length, 16, generator=generator).requires_grad_() for _ in range(3)]
    mask = torch.zeros(length, length)
    mask[3] = masked
    with sdpa_kernel([backend]):
        output = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=mask)
    output[:, :, 3].sum().backward()
    return output[:, :, 3].detach(), [state.grad for state in states]


print(torch.__version__)
lowest = torch.finfo(torch.float32).min
for length, masked, times in ((64, lowest, 64), (8, lowest, 8), (64, -1e9, 64), (64, -1e4, 1), (64, -torch.inf, 1)):
    row, gradients = row_and_gradients(SDPBackend.MATH, length, masked)
    fused_row, fused_gradients = row_and_gradients(SDPBackend.FLASH_ATTENTION, length, masked)
    torch.testing.assert_close(fused_row, row, atol=1e-5, rtol=1e-5)
    print(f"{length} keys, mask {masked:g}: the fused gradients are {times} times those of the math backend")
    for fused, right in zip(fused_gradients, gradients, strict=True):
        assert masked == -torch.inf or right.norm() > 0
        torch.testing.assert_close(fused, right * times, atol=1e-4, rtol=1e-3, msg="not as it was seen")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
