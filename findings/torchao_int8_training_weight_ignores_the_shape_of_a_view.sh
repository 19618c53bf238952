#!/usr/bin/env bash
# torchao 0.18.0 (torch 2.13.0): `view` and `reshape` of an int8 training weight return the weight in its own shape, whatever
# shape was asked for, without an error.
#
# w is an Int8QuantizedTrainingLinearWeight of shape (4, 8). Expected of w.view(-1): shape (32,), or an error; of
# w.reshape(8, 4): (8, 4). Seen: (4, 8) both times. `weight.view(-1)` is what FSDP2 asks for, and where it is meant; a model
# that groups the rows of a weight (view(groups, -1, width)) gets the ungrouped matrix, and a size error later, or none.
# fxopt's int8 weights are a class of its own that reshapes (fxopt/precision/int8_operations.py).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchao==0.18.0 numpy
cat > "$folder/show.py" <<'PYTHON'
import logging

logging.getLogger("torchao").setLevel("ERROR")

import torch
import torchao
from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight as Weight

print(f"torch {torch.__version__}, torchao {torchao.__version__}")
weight = Weight.from_float(torch.randn(4, 8))
seen = [tuple(weight.view(-1).shape), tuple(weight.reshape(8, 4).shape)]
plain = torch.randn(4, 8)
print("view(-1):", seen[0], "of a plain tensor:", tuple(plain.view(-1).shape))
print("reshape(8, 4):", seen[1], "of a plain tensor:", tuple(plain.reshape(8, 4).shape))
assert seen == [(4, 8), (4, 8)], "not as it was seen"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
