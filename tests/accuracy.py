"""The one accuracy rule of all tests: error against float64 <= eager code's in the same dtype * 1.1 + one rounding.

Errors are taken in the root mean square and in the largest element. The first is what makes a systematic error of 1 %
fail in bfloat16, whose single rounding may already be 0.4 % of an element. In float32, where errors are some 1e-7, the
largest of many and the mean of few are a matter of luck: there they may be twice eager code's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, eager: Tensor, truth: Tensor, what: str = "result") -> None:
    """Hold `actual` to the rule: `eager` is the plain code's result in the same dtype, `truth` its float64 result."""
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, must be {tuple(truth.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: {actual.dtype}, must be {eager.dtype}"
    if truth.numel() == 0:
        return
    assert not actual.isnan().any(), f"{what}: {int(actual.isnan().sum())} of {actual.numel()} elements are NaN"
    one_rounding = torch.finfo(actual.dtype).eps / 2
    for name, norm in (("root mean square", _root_mean_square), ("largest", _largest)):
        luck = actual.element_size() > 2 and (norm is _largest or actual.numel() < 100)
        factor = 2.0 if luck else 1.1
        error, eager_error = norm(actual - truth), norm(eager - truth)
        limit = factor * eager_error + one_rounding * norm(truth)
        assert error <= limit, (
            f"{what}: {name} error {error:.3g} > {limit:.3g} (eager code's error is {eager_error:.3g})"
        )


def assert_op_as_accurate(
    op: Callable[..., Any], reference: Callable[..., Any], *inputs: Any, seed: int = 0, **options: Any
) -> None:
    """Hold every output of `op` and the gradient of every input that requires one to the rule, against `reference`.

    `inputs` are in the dtype to test and keep their strides; the truth is the reference on them in float64.
    """
    actual = outputs_and_gradients(op, *inputs, seed=seed, **options)
    eager = outputs_and_gradients(reference, *inputs, seed=seed, **options)
    wide = [_to_float64(value) for value in inputs]
    truth = outputs_and_gradients(reference, *wide, seed=seed, **{k: _to_float64(v) for k, v in options.items()})
    for name in truth:
        assert_as_accurate(actual[name], eager[name], truth[name], name)


def outputs_and_gradients(
    function: Callable[..., Any], *inputs: Any, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Run forward and backward with random gradients of the outputs; name each output and each input's gradient."""
    named = {f"input {i}": value for i, value in enumerate(inputs)} | options
    leaves = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.requires_grad}
    outputs = function(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if leaves:
        generator = torch.Generator().manual_seed(seed)
        # Drawn in bfloat16, so that the same numbers arrive whatever the dtype.
        upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def _to_float64(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def _root_mean_square(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
