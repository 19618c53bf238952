#!/usr/bin/env bash
# Triton 3.7.1, interpreter (TRITON_INTERPRET=1, with torch 2.13.0): a cast from float32 to float8e4nv (e4m3) neither
# saturates nor gives NaN above 464: 500 becomes 256, 10000 becomes 320, infinity 256. Ties are rounded away from
# zero, and small numbers are cut off.
#
# Expected: 448 for all of them, as torch's cast gives, and as the same kernel compiled for sm_90 does (its PTX is
# looked at: cvt.rn.satfinite.e4m3x2.f32). Seen: the values above; NaN, too, comes out as a number (384). Of 1.0625
# and 17, between two numbers, the upper (torch: the even one, 1 and 16); below 2**-6 the error of random numbers is
# nearly twice that of rounding.
# The interpreter is how Triton kernels are tested without a GPU; the documentation promises numpy's equivalents of
# the operations. A quantizing kernel tested there shows errors that it does not have, and one that forgets to clamp,
# or divides by a scale that is too small, gives finite, wrong numbers in place of the limit.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy
cat > "$folder/show.py" <<'PYTHON'
import os

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def cast_kernel(given, result, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(result + at, tl.load(given + at).to(tl.float8e4nv).to(tl.float32))


def show_what_is_compiled():
    types = {"given": "*fp32", "result": "*fp32", "SIZE": "constexpr"}
    source = ASTSource(cast_kernel, types, {(2,): 128})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    cast = next(line.split()[0] for line in ptx.splitlines() if "cvt" in line)
    print(f"triton {triton.__version__}, compiled for sm_90: {cast}")
    assert cast == "cvt.rn.satfinite.e4m3x2.f32", "not as it was seen"
    raise SystemExit


def in_triton(given):
    result = torch.zeros_like(given)
    cast_kernel[(1,)](given, result, given.numel())
    return result


def in_torch(given):
    return given.to(torch.float8_e4m3fn).float()


if not os.environ.get("TRITON_INTERPRET"):
    show_what_is_compiled()
print(f"triton {triton.__version__}, torch {torch.__version__}")
large = torch.tensor([448.0, 500.0, 1000.0, 1e4, torch.inf, -500.0, torch.nan, 256.0])
between = torch.tensor([1.0625, 17.0])
print("given:", large.tolist() + between.tolist())
print("triton's interpreter:", in_triton(large).tolist() + in_triton(between).tolist())
print("torch:", in_torch(large).tolist() + in_torch(between).tolist())
assert in_torch(large)[:6].tolist() == [448.0] * 5 + [-448.0] and in_torch(large)[6].isnan()
assert in_torch(between).tolist() == [1.0, 16.0]
small = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * 2**-8
errors = [((cast(small) - small).norm() / small.norm()).item() for cast in (in_triton, in_torch)]
print(f"relative error of small numbers: {errors[0]:.3f}, torch {errors[1]:.3f}")
assert in_triton(large).tolist() == [448.0, 256.0, 256.0, 320.0, 256.0, -256.0, 384.0, 256.0], "not as it was seen"
assert in_triton(between).tolist() == [1.125, 18.0] and errors[0] > 1.8 * errors[1], "not as it was seen"
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/show.py"
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/show.py"
