#!/usr/bin/env bash
# PyTorch 2.13.0 and 2.14.1 on a CPU: `index_reduce(reduce="mean")` and `segment_reduce("mean")` add up in the dtype
# they are given: in bf16 the mean of more than a few hundred rows is wrong by a factor, without a word.
#
# 2048 rows of 3 and 2048 rows of 1, one target. Expected: 2, which mean() and scatter_reduce(reduce="mean") give in
# bf16 as well.
# Seen: 4 from index_reduce and 0.25 from segment_reduce; of 4096 random numbers between 0 and 1, 1.0 and 0.0625 for
# 0.4961. The sum stops growing once a row is less than half its spacing, and index_reduce's count, kept in bf16 too,
# stops at 256. In float16 the two give 3.67 and 1.83 for 2.
# `index_reduce` warns that it is in beta; no documentation speaks of the dtype of the sum, and the three look
# interchangeable.
# They are what one reaches for to pool tokens by document, or experts' outputs by token.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.filterwarnings("ignore", message="index_reduce")

import torch


def means(rows):
    to_one = torch.zeros(len(rows), dtype=torch.int64)
    target = torch.zeros(1, dtype=rows.dtype)
    return {
        "mean": rows.mean().item(),
        "scatter_reduce": target.scatter_reduce(0, to_one, rows, "mean", include_self=False).item(),
        "index_reduce": target.index_reduce(0, to_one, rows, "mean", include_self=False).item(),
        "segment_reduce": torch.segment_reduce(rows, "mean", lengths=torch.tensor([len(rows)])).item(),
    }


print(torch.__version__)
steps = torch.cat([torch.full((2048,), 3.0), torch.ones(2048)])
seen = {dtype: means(steps.to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
for dtype, of_dtype in seen.items():
    print(f"{dtype}, the mean of 3 and 1, 2048 times each: {of_dtype}")
random = means(torch.rand(4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))
print(f"bf16, random numbers from 0 to 1: {random}")
assert set(seen[torch.float32].values()) == {2.0}
assert all(of_dtype["mean"] == of_dtype["scatter_reduce"] == 2.0 for of_dtype in seen.values())
bf16, fp16 = seen[torch.bfloat16], seen[torch.float16]
assert (bf16["index_reduce"], bf16["segment_reduce"]) == (4.0, 0.25), "not as it was seen"
assert random["mean"] == random["scatter_reduce"] == 0.49609375
assert (random["index_reduce"], random["segment_reduce"]) == (1.0, 0.0625), "not as it was seen"
assert fp16["index_reduce"] > 3.6 and fp16["segment_reduce"] < 1.9, "not as it was seen"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
