"""int8 weights as values, and as a class of fxopt's own."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchao.prototype.quantized_training import Int8QuantizedTrainingLinearWeight
from torchao.prototype.quantized_training import int8_weight_only_quantized_training as torchaos_int8
from torchao.quantization import quantize_

from fxopt.precision.annotate import annotate
from fxopt.precision.int8_weight import Int8Weight, dequantized, fill, quantized
from fxopt.precision.parameter_storage import is_int8
from fxopt.precision.quantized import quantize_parameter

BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_what_int8_can_hold_exactly_is_held_exactly(dtype: torch.dtype) -> None:
    """Codes whose largest is 96 to 127, widened to the dtype of their scale and found again; other rows to the nearest.

    torchao takes the largest value for 127 scales, and so moves the codes of all rows where it is not.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-95, 96, (200, 300), generator=generator)
    codes[torch.arange(200), torch.arange(200)] = torch.randint(96, 128, (200,), generator=generator)
    scale = (0.01 * torch.rand(200, generator=generator) + 1e-4).to(dtype)
    before = Int8Weight(codes.to(torch.int8), scale)
    after = quantized(dequantized(before, dtype))
    assert torch.equal(after.int_data, before.int_data) and torch.equal(after.scale, before.scale)
    others = torch.randn(64, 300, generator=generator).to(dtype)
    others[3], others[4], others[5, 7] = 0, 1, torch.nan
    right = Int8Weight.from_float(others)
    found = quantized(others)
    assert torch.equal(found.int_data, right.int_data) and found.scale.equal(right.scale) is False  # NaN
    assert torch.equal(found.scale.nan_to_num(), right.scale.nan_to_num()) and found.scale[3] == 0


def test_other_content_is_held_exactly_where_int8_can() -> None:
    generator = torch.Generator().manual_seed(0)
    target, source = (quantized(torch.randn(20, 64, generator=generator).to(BF16)) for _ in range(2))
    fill(target, dequantized(source, BF16), stochastic=False)
    assert torch.equal(target.int_data, source.int_data) and torch.equal(target.scale, source.scale)


# The class -----------------------------------------------------------------------------------------------------------


def test_torchaos_class_is_left_as_it_was() -> None:
    """In a fresh process, which imports torchao first: what it has then, it has afterwards, object by object."""
    code = """
from torchao.prototype.quantized_training.int8 import Int8QuantizedTrainingLinearWeight as Theirs
from torchao.utils import TorchAOBaseTensor
def state():
    tables = [dict(cls.__dict__.get(name, {}).get(cls, {})) for cls in (Theirs, TorchAOBaseTensor)
              for name in ("_ATEN_OP_TABLE", "_TORCH_FN_TABLE")]
    owners = [list(getattr(Theirs, name)) for name in ("_ATEN_OP_TABLE", "_TORCH_FN_TABLE")]
    return [dict(vars(Theirs)), dict(vars(TorchAOBaseTensor)), Theirs.__torch_dispatch__, tables, owners]
before = state()
import fxopt.precision.int8_operations, fxopt.precision.quantized, fxopt.integrations.peft
from fxopt.precision.int8_weight import Int8Weight
assert state() == before and before[3][0] and issubclass(Int8Weight, Theirs)
assert Int8Weight.__torch_dispatch__.__func__ is not Theirs.__torch_dispatch__.__func__
assert list(Int8Weight._ATEN_OP_TABLE) == [Int8Weight]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["int8_weight", "int8_operations"])
def test_who_has_the_class_has_its_operations(module: str) -> None:
    """As who unpickles a weight has the module of its class."""
    code = f"import torch, fxopt.precision.{module}; from fxopt.precision.int8_weight import Int8Weight as W\n"
    code += "assert W.from_float(torch.ones(2, 2)).norm() == 2"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "taken",
    [
        lambda w: w.detach(),
        lambda w: w.data,
        lambda w: w.clone(),
        lambda w: w[2:4],
        lambda w: w.narrow(0, 2, 3),
        lambda w: w.split(4)[1],
        lambda w: torch.cat([w, w]),
        lambda w: w.to(torch.float32),
        lambda w: w.to("cpu", copy=True),
        lambda w: w.new_zeros(3, 16),
        lambda w: w.view(-1),
        lambda w: w.as_strided((8, 16), (16, 1)),
        lambda w: w.contiguous(),
        lambda w: w.fsdp_post_all_gather(w.fsdp_pre_all_gather(None)[0], None, BF16)[0],
        copy.copy,
        copy.deepcopy,
        lambda w: pickle.loads(pickle.dumps(w)),
    ],
)
def test_what_comes_of_an_int8_weight_is_of_its_class(taken: Callable[[Any], Any]) -> None:
    linear = nn.Linear(16, 8, bias=False).to(BF16)
    assert type(taken(quantize_parameter(linear, linear.weight, BF16))) is Int8Weight


def theirs() -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(16, 8, bias=False).to(BF16)
    quantize_(linear, torchaos_int8())
    return linear


def test_torchaos_weights_go_into_ours_and_back_and_stand_beside_them() -> None:
    right: Any = theirs().weight
    linear = nn.Linear(16, 8, bias=False).to(BF16)
    weight: Any = quantize_parameter(linear, linear.weight, BF16)
    file = io.BytesIO()
    torch.save({"weight": right}, file)
    file.seek(0)
    linear.load_state_dict(torch.load(file))
    assert type(linear.weight) is Int8Weight and torch.equal(weight.int_data, right.int_data)
    assert torch.equal(weight, right) and torch.equal(weight.scale, right.scale)
    assert type(torch.cat([right, weight])) is Int8Weight and (weight - right).count_nonzero() == 0
    with torch.no_grad():
        weight.mul_(2)
        other = theirs()
        other.load_state_dict(linear.state_dict())
        assert type(other.weight) is Int8QuantizedTrainingLinearWeight
        assert torch.equal(other.weight.int_data, weight.int_data)  # type: ignore[attr-defined]
        weight.data = right.data
        assert type(weight.data) is Int8Weight and torch.equal(weight, right)
        weight.requires_grad_(False)[3] = right[4:5]
        assert ((weight[3] - right.dequantize()[4]).abs() <= 0.51 * weight.scale[3]).all()


def test_an_int8_layer_of_torchaos_stays_one_where_it_is_annotated_and_loaded() -> None:
    model = nn.Sequential(theirs(), nn.Linear(8, 8, bias=False))
    held = model[0].weight
    annotate(model, "int8")
    assert model[0].weight is held and [type(layer.weight) for layer in model] == [type(held), Int8Weight]
    assert is_int8(held) and type(held) is Int8QuantizedTrainingLinearWeight
    values = {name: torch.randn_like(dequantized(p, torch.float32)) for name, p in model.named_parameters()}
    model.load_state_dict(values)
    assert type(model[0].weight) is Int8QuantizedTrainingLinearWeight
    for name, parameter in model.named_parameters():
        step = values[name].abs().amax(1, keepdim=True) / 127
        assert ((dequantized(parameter, torch.float32) - values[name]).abs() <= 1.1 * step).all()
