"""The two ways into an op: straight to its kernel, and through the dispatcher where somebody looks on."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.kernels.glu import swiglu
from fxopt.kernels.op import OPS
from fxopt.kernels.rms_norm import rms_norm
from fxopt.kernels.rope import rope


class Recorder(TorchDispatchMode):
    """The names of all ops that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def sample_call(name: str, device: str) -> tuple[list[Tensor], tuple]:
    """Tensors to differentiate, and what else the op takes."""
    x = torch.randn(2, 3, 4, 8, dtype=torch.bfloat16, device=device).requires_grad_()
    if name == "rms_norm":
        return [x, torch.nn.Parameter(torch.randn(8, device=device))], (1e-6, False)
    if name == "glu":
        return [x, torch.randn_like(x).requires_grad_()], ("silu",)
    cos, sin = torch.randn(2, 1, 1, 4, 8, device=device).requires_grad_().unbind()
    return [x, cos, sin], ("halves",)


@pytest.mark.parametrize("name", ["rms_norm", "glu", "rope"])
def test_both_ways_are_bit_by_bit_the_same(name: str, device: str) -> None:
    tensors, rest = sample_call(name, device)
    results = []
    for call in (OPS[name], OPS[name].overload):
        y = call(*tensors, *rest)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "glu", "rope"])
def test_training_calls_the_kernel_itself(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, rest = sample_call(name, device)
    for op in (OPS[name], OPS[f"{name}_backward"]):
        monkeypatch.setattr(op, "overload", None)
    torch.autograd.grad(OPS[name](*tensors, *rest).sum(), tensors)


def test_a_dispatch_mode_sees_the_op(device: str) -> None:
    (x, weight), _ = sample_call("rms_norm", device)
    with Recorder() as recorder:
        y = rms_norm(x, weight, 1e-6)
        y.sum().backward()
    assert {"fxopt::rms_norm", "fxopt::rms_norm_backward"} <= set(recorder.names)


def test_fake_and_meta_tensors_and_compilers_get_shapes(device: str) -> None:
    meta = torch.empty(2, 8, dtype=torch.bfloat16, device="meta")
    assert swiglu(meta, meta).shape == meta.shape
    with FakeTensorMode():
        assert rope(torch.ones(1, 2, 3, 8), torch.ones(3, 8), torch.ones(3, 8)).shape == (1, 2, 3, 8)
    gate, up = torch.randn(2, 4, 8, device=device).unbind()
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate, up), swiglu(gate, up))


def test_functorch_transforms_are_refused(device: str) -> None:
    """As of any op of `torch.library.custom_op`; nothing is differentiated wrongly."""
    (x, weight), _ = sample_call("rms_norm", device)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: rms_norm(x, weight, 1e-6).float().square().sum())(x)


def test_an_autograd_function_only_where_something_is_differentiated(device: str) -> None:
    (x, weight), _ = sample_call("rms_norm", device)
    with torch.no_grad():
        assert rms_norm(x, weight, 1e-6).grad_fn is None
    with torch.inference_mode():
        assert rms_norm(x, weight, 1e-6).is_inference()
    assert rms_norm(x.detach(), weight.detach(), 1e-6).grad_fn is None
    assert type(rms_norm(x, weight, 1e-6).grad_fn).__name__ == "fxopt::rms_normBackward"
