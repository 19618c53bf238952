#!/usr/bin/env bash
# PyTorch 2.13.0 (oneDNN 3.12.0) on a CPU with AMX: a bf16 matrix product whose inner size is no multiple of 32 carries NaN
# from one row into the row before it.
#
# a (64, 307) @ b (307, 64), both bf16, row 3 of a is NaN. Expected: row 3 of the product is NaN, no other.
# Seen (Intel Xeon with amx_bf16): rows 2 and 3 are NaN. From 32 rows on; with 16 rows, in float32, with rows that lie a
# multiple of 64 elements apart and zeros between them, or with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, row 3 alone.
# The tiles read past the end of a row into the next and multiply by zero, which finite numbers do not show.
# Whoever hunts a NaN by rows (one bad sample of a batch) looks at the wrong one as well; vocabularies such as 50257 and 32001
# are concerned. fxopt lays the rows of its logits apart (kernels/linear_head.py).
set -euo pipefail

if ! grep -qw amx_bf16 /proc/cpuinfo; then
  echo "needs a CPU with amx_bf16; this one has none: nothing was shown" >&2
  exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import torch


def nan_rows(num_rows, dtype=torch.bfloat16, apart=None):
    torch.manual_seed(0)
    a = torch.zeros(num_rows, apart or 307, dtype=dtype)[:, :307]
    a.copy_(torch.rand(num_rows, 307))
    a[3] = float("nan")
    return (a @ torch.rand(307, 64).to(dtype)).isnan().any(1).nonzero().flatten().tolist()


print(torch.__version__)
seen = {
    "bf16, 64 rows": nan_rows(64),
    "bf16, 16 rows": nan_rows(16),
    "float32, 64 rows": nan_rows(64, torch.float32),
    "bf16, 64 rows that lie 320 elements apart": nan_rows(64, apart=320),
}
for what, rows in seen.items():
    print(f"{what}: NaN in rows {rows}")
assert list(seen.values()) == [[2, 3], [3], [3], [3]], "not as it was seen"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
if ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 "$folder/venv/bin/python" "$folder/show.py" > "$folder/without.txt" 2>&1; then
  echo "without AMX it was the same: not as it was seen" >&2
  exit 1
fi
grep -q "bf16, 64 rows: NaN in rows \[3\]" "$folder/without.txt"
echo "without AMX: NaN in row 3 alone"
