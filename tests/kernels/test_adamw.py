"""AdamW on two-byte parameters: exact against the specification, unbiased in its rounding, the same on every path."""

import pytest
import torch
from torch import Tensor

from fxopt.kernels import adamw as kernel
from fxopt.kernels.adamw import adamw_, adamw_reference, foreach_adamw_
from fxopt.kernels.rounding import noise_key, stochastic_round_reference

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
ODD_NUMELS = (1, 7, 255, 4097, kernel.CHUNK_NUMEL + 3)


def problem(numel: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, g, m, v = torch.randn(4, numel, generator=generator)
    return p.to(dtype), g.to(dtype), 0.1 * m, v.square()


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 towards zero from a float32, and the one away from it; both the value itself where it is one."""
    full = torch.full_like(value, (1 << 16) - 1, dtype=torch.int32)
    return stochastic_round_reference(value, torch.zeros_like(full)), stochastic_round_reference(value, full)


@pytest.fixture(params=["fused", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With torch's private fused kernel, and as if this torch had none."""
    if request.param == "plain":
        monkeypatch.setattr(kernel, "_fused_is_right", lambda: False)
    else:
        assert kernel._fused_is_right(), (
            "this torch's private _fused_adamw_ changed: the CPU step falls back to a slow path"
        )
    return str(request.param)


@pytest.mark.parametrize("numel", ODD_NUMELS)
def test_float32_matches_the_specification(path: str, numel: int) -> None:
    p, g, m, v = problem(numel, torch.float32)
    expected = adamw_reference(p, g, m.double(), v.double(), **HYPER, step=3)
    adamw_(p, g, m, v, torch.tensor(3.0), **HYPER, rounding="stochastic")
    for found, right in zip((p, m, v), expected, strict=True):
        torch.testing.assert_close(found, right.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("numel", ODD_NUMELS)
def test_bfloat16_is_one_of_the_two_neighbours(path: str, numel: int) -> None:
    p, g, m, v = problem(numel, torch.bfloat16)
    p32, m32, v32 = p.float(), m.clone(), v.clone()
    adamw_(p32, g.float(), m32, v32, torch.tensor(3.0), **HYPER, rounding="nearest")
    adamw_(p, g, m, v, torch.tensor(3.0), **HYPER, rounding="stochastic")
    assert torch.equal(m, m32) and torch.equal(v, v32)
    low, high = neighbours(p32)
    assert torch.all((p == low) | (p == high))
    if numel > 4000:
        assert not torch.equal(p, low) and not torch.equal(p, high)


def test_nearest_rounds_to_nearest(path: str) -> None:
    p, g, m, v = problem(4097, torch.bfloat16)
    p32 = p.float()
    adamw_(p32, g.float(), m.clone(), v.clone(), torch.tensor(3.0), **HYPER, rounding="nearest")
    adamw_(p, g, m, v, torch.tensor(3.0), **HYPER, rounding="nearest")
    assert torch.equal(p, p32.bfloat16())


@pytest.mark.parametrize("up", [0.5, 0.1, 1e-3])
def test_rounding_is_unbiased(up: float) -> None:
    """`up`, a share of one step of bfloat16 (2**-7 at 1.0), is how often a value must round up."""
    numel, seeds = kernel.CHUNK_NUMEL, 8  # one chunk a seed: as many independent numbers as elements
    hyper = {"lr": up * 2**-7, "beta1": 0.9, "beta2": 0.999, "eps": 0.0, "weight_decay": 0.0}
    g = -torch.ones(numel, dtype=torch.bfloat16)
    risen = 0
    for seed in range(seeds):
        p, m, v = torch.ones_like(g), torch.zeros(numel), torch.zeros(numel)
        adamw_(p, g, m, v, torch.tensor(1.0), **hyper, rounding="stochastic", seed=seed)
        high = (p == 1.0 + 2**-7).sum().item()
        assert high + (p == 1.0).sum().item() == numel
        risen += high
    spread = (up * (1 - up) / (numel * seeds)) ** 0.5
    assert abs(risen / (numel * seeds) - up) < 5 * spread


def test_noise_of_two_parameters_two_steps_and_two_seeds_differs() -> None:
    keys = {noise_key(seed, step, index) for seed in range(20) for step in range(20) for index in range(20)}
    assert len(keys) == 8000
    assert all(0 <= key < 1 << 62 for key in keys)

    def run(seed: int, step: float, index: int) -> Tensor:
        p, g, m, v = problem(2000, torch.bfloat16)
        adamw_(p, g, m, v, torch.tensor(step), **HYPER, rounding="stochastic", seed=seed, index=index)
        return p

    base = run(0, 5, 0)
    assert torch.equal(base, run(0, 5, 0))
    for other in (run(1, 5, 0), run(0, 5, 1)):
        assert (base != other).float().mean() > 0.05


def test_many_at_once_equal_one_by_one(path: str) -> None:
    sizes = [3, kernel.CHUNK_NUMEL + 5, 576, 576, 1, 0, 100_000]
    dtypes = [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    steps = [torch.tensor(float(step)) for step in (2, 2, 7, 3, 2, 2, 7)]
    one = [problem(size, dtype, seed) for seed, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))]
    many = [tuple(tensor.clone() for tensor in tensors) for tensors in one]
    for index, (tensors, step) in enumerate(zip(one, steps, strict=True)):
        adamw_(*tensors, step, **HYPER, rounding="stochastic", seed=4, index=index)
    p, g, m, v = (list(tensors) for tensors in zip(*many, strict=True))
    foreach_adamw_(p, g, m, v, steps, **HYPER, rounding="stochastic", seed=4, indices=range(len(sizes)))
    for left, right in zip(one, many, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    p, g, m, v = (tensor.view(30, 40) for tensor in problem(1200, dtype))
    expected, *_ = adamw_reference(p, g, m, v, **HYPER, step=3)
    p, g = p.t().contiguous().t(), g[:, torch.arange(40)].t().contiguous().t()
    adamw_(p, g, m, v, torch.tensor(3.0), **HYPER, rounding="nearest")
    torch.testing.assert_close(p, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_and_nan_stay(path: str, dtype: torch.dtype) -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0, 1.0], dtype=dtype)
    g = torch.tensor([1.0, 1.0, 1.0, float("nan"), float("inf")], dtype=dtype)
    for seed in range(20):
        p, m, v = values.clone(), torch.zeros(5), torch.zeros(5)
        adamw_(p, g, m, v, torch.tensor(1.0), **{**HYPER, "weight_decay": 0.0}, rounding="stochastic", seed=seed)
        assert p[0] == float("inf") and p[1] == float("-inf") and p[2:].isnan().all()


def test_other_dtypes_are_refused() -> None:
    p, g, m, v = problem(8, torch.float16)
    with pytest.raises(TypeError, match="bfloat16 and float32 parameters, got torch"):
        adamw_(p, g, m, v, torch.tensor(1.0), **HYPER, rounding="stochastic")
    p, g, m, v = problem(8, torch.bfloat16)
    with pytest.raises(TypeError, match="states in float32"):
        adamw_(p, g, m.bfloat16(), v, torch.tensor(1.0), **HYPER, rounding="stochastic")


def test_the_fused_kernel_is_checked_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(params: list[Tensor], *args: object, **options: object) -> None:
        params[0].mul_(0.99)

    for substitute in (None, wrong):
        with monkeypatch.context() as patch:
            if substitute is None:
                patch.delattr(torch, "_fused_adamw_")
            else:
                patch.setattr(torch, "_fused_adamw_", substitute)
            assert not kernel._fused_is_right.__wrapped__()
