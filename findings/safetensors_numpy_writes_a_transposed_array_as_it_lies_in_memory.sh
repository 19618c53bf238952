#!/usr/bin/env bash
# safetensors 0.8.0 (numpy 2.4.6): `safetensors.numpy.save_file` writes the memory of an array and never looks at its
# strides: a transposed array comes back with its numbers in other places, without an error. safetensors 0.7.0 wrote
# it rightly.
#
# a is [[0, 1, 2], [3, 4, 5]]; a.T is saved and loaded. Expected: [[0, 3], [1, 4], [2, 5]], as 0.7.0 gives, or the
# error that `safetensors.torch.save_file` raises. Seen with 0.8.0: [[0, 1], [2, 3], [4, 5]], and the same of `save`;
# the shape is right.
# The docstring of both releases says "Tensors need to be contiguous and dense"; in 0.7.0 nothing came of breaking
# that, in 0.8.0 the file is wrong and nothing says so. Upstream knows of it.
# Who converts checkpoints between layouts (`kernel.T` of a JAX or Conv1D weight) writes files that load, train and
# are wrong.
# `numpy.ascontiguousarray(a.T)` is written rightly.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'PYTHON'
import sys

import numpy
import safetensors
from safetensors.numpy import load, load_file, save, save_file

path, right = sys.argv[1], sys.argv[2] == "right"
array = numpy.arange(6.0).reshape(2, 3)
save_file({"a": array.T, "made contiguous": numpy.ascontiguousarray(array.T)}, path)
seen = load_file(path)
print(f"safetensors {safetensors.__version__}: saved {array.T.tolist()}, loaded {seen['a'].tolist()}")
assert numpy.array_equal(seen["made contiguous"], array.T)
assert numpy.array_equal(load(save({"a": array.T}))["a"], seen["a"])
assert seen["a"].shape == (3, 2)
assert seen["a"].tolist() == (array.T if right else array.reshape(3, 2)).tolist(), "not as it was seen"
PYTHON
for version in 0.7.0 0.8.0; do
  python3 -m venv "$folder/venv-$version"
  "$folder/venv-$version/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.4.6
  how=$([ "$version" = 0.7.0 ] && echo right || echo wrong)
  "$folder/venv-$version/bin/python" "$folder/show.py" "$folder/$version.safetensors" "$how"
done
