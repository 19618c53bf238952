#!/usr/bin/env bash
# torchao 0.18.0 (torch 2.13.0): Float8WeightOnlyConfig turns a row of a weight that is all zeros into NaN, and the
# model's outputs with it, without an error.
#
# A linear layer with row 5 zero. Expected: row 5 stays zero, as with torchao's own int8 and int4 weights, and as
# torchao's float8 training does. Seen: row 5 of the weight is NaN and so is output 5, in float32 and in bf16; a
# weight all of zeros gives NaN alone.
# The scale of a row is its largest value / 448, here 0, and the row is divided by it. The documentation does not
# exclude such rows.
# They are common: rows of a vocabulary padded to a multiple of 64 or added for new tokens, pruned rows,
# zero-initialised output layers and LoRA's B. In a head one such row makes every loss NaN, since the softmax sums
# over it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchao==0.18.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import logging

logging.disable(logging.WARNING)

import torch
import torchao
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_


def nan_outputs(config, dtype, rows=(5,)):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
    layer.weight.data[list(rows)] = 0
    quantize_(layer, config)
    return layer(torch.randn(2, 64, dtype=dtype)).isnan().any(0).nonzero().flatten().tolist()


print(f"torch {torch.__version__}, torchao {torchao.__version__}")
int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
for dtype in (torch.float32, torch.bfloat16):
    for name, config in (("float8", Float8WeightOnlyConfig()), ("int8", Int8WeightOnlyConfig()), ("int4", int4)):
        seen = nan_outputs(config, dtype)
        print(f"{dtype}, {name} weight with row 5 zero: NaN in outputs {seen}")
        assert seen == ([5] if name == "float8" else []), "not as it was seen"
assert nan_outputs(Float8WeightOnlyConfig(), torch.float32, range(64)) == list(range(64)), "not as it was seen"
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 2> "$folder/errors.txt" || {
  cat "$folder/errors.txt" >&2
  exit 1
}
