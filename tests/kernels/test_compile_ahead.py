"""Each Triton kernel builds for real targets, on a machine that has none of them, and keeps its values in registers."""

import os
import re
from importlib.metadata import version

import pytest

from benchmarks.kernels import KERNELS, TARGETS, compile_ahead, resources
from fxopt.kernels.backend import TRITON_DEVICES
from fxopt.kernels.linear_cross_entropy import _Options
from fxopt.kernels.log_prob_rows import LogitOptions
from fxopt.kernels.rope import LAYOUTS, _orders

pytestmark = [
    pytest.mark.skipif(not TRITON_DEVICES, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"),
]


# The options of the loss and of log-probabilities are constants of their kernels.
OPTIONS: dict[str, float] = {
    "logit_scale": 0.0625,
    "softcap": 30.0,
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "temperature": 0.7,
}
ON_THE_HEAD = {
    name: _Options._fields if name.startswith("linear_cross_entropy") else LogitOptions._fields
    for name in KERNELS
    if name.startswith("linear_")
}


@pytest.fixture
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the kernels on the output head the option named by the test's parameter, all that they have, or none."""
    for name, fields in ON_THE_HEAD.items():
        kernel, constants, pointers = KERNELS[name]
        chosen = {field.upper(): OPTIONS[field] for field in fields if request.param in (field, "all")}
        monkeypatch.setitem(KERNELS, name, (kernel, constants | chosen, pointers))


CASES = [(name, "") for name in KERNELS] + [(name, "all") for name in ON_THE_HEAD]
EVERY_CASE = [(name, "") for name in KERNELS]
EVERY_CASE += [(name, option) for name, fields in ON_THE_HEAD.items() for option in (*fields, "all")]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("name", "options"), CASES, indirect=["options"])
def test_builds(name: str, options: None, dtype: str, target: str) -> None:
    binary = compile_ahead(name, dtype, target)
    assert binary.asm["hsaco" if target.startswith("hip") else "cubin"]


@pytest.mark.parametrize(("name", "options"), EVERY_CASE, indirect=["options"])
def test_spills_nothing(name: str, options: None, request: pytest.FixtureRequest) -> None:
    registers, spilled_bytes, _ = resources(name, "cuda:90")
    assert 0 < registers <= 128
    # Triton 3.8 puts two registers aside in the loss that has every option at once; 3.9 does not.
    is_full = (name, request.node.callspec.params["options"]) == ("linear_cross_entropy loss and gradient", "all")
    assert spilled_bytes <= (8 if is_full and version("triton").startswith("3.8.") else 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("linear_log_prob")])
def test_log_probabilities_spill_nothing_on_any_target(name: str, target: str) -> None:
    assert resources(name, target)[1] == 0


def rope_flags(layout: str, *, wide: bool, backward: bool) -> dict[str, bool]:
    x_pairs, y_pairs = _orders(layout, backward)
    return {"X_PAIRS": x_pairs, "Y_PAIRS": y_pairs, "TABLE_PAIRS": layout == "pairs", "TABLE_WIDE": wide}


@pytest.mark.parametrize("table", ["bf16", "fp32"])
@pytest.mark.parametrize("wide", [True, False], ids=["D", "D/2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_layouts_of_rope(direction: str, layout: str, wide: bool, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All build and spill nothing; where strides are multiples of 16, global memory is moved by 16 bytes at once."""
    kernel, constants, _ = KERNELS[f"rope {direction}"]
    flags = rope_flags(layout, wide=wide, backward=direction == "backward")
    tables = {"cos_ptr": f"*{table}", "sin_ptr": f"*{table}"}
    monkeypatch.setitem(KERNELS, "rope", (kernel, constants | flags, tables))
    for target in TARGETS:
        assert compile_ahead("rope", "bf16", target).asm
    assert resources("rope", "cuda:90")[1] == 0

    strides = {name: 64 for name in kernel.arg_names if "_stride_" in name}
    monkeypatch.setitem(KERNELS, "rope", (kernel, constants | flags | strides, tables))
    registers, spilled_bytes, _ = resources("rope", "cuda:90")
    assert 0 < registers <= 128
    assert spilled_bytes == 0
    moves = re.findall(r"(?:ld|st)\.global\.[\w.]*", compile_ahead("rope", "bf16", "cuda:90").asm["ptx"])
    assert set(moves) == {"ld.global.v4.b32", "st.global.v4.b32"}
