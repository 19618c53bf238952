"""`launch` compiles a variant for whatever Triton would compile one for, and finds it again."""

from typing import Any

import pytest
import torch

from fxopt.kernels import launch as module
from fxopt.kernels.launch import launch


class Kernel:
    """Triton's, as far as `launch` knows it: what it was compiled for, and what its variants were called with."""

    arg_names = ("x_ptr", "y_ptr", "n", "scale", "WIDE", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[tuple[object, ...]] = []
        self.calls: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(*args: object, **constants: object) -> "Variant":
            self.compiled.append((grid, *args, constants))
            return Variant(self)

        return compile_and_run


class Variant:
    packed_metadata = ()

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.calls.append((grid, *args))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(module, "_COMPILED", {})
    return Kernel()


X = torch.zeros(64)


def test_the_second_call_takes_the_variant_of_the_first(kernel: Kernel) -> None:
    for n, scale in ((5, 0.5), (7, 2.0), (6, 1.0)):
        launch(kernel, (n,), X, None, n, scale, BLOCK=8, WIDE=True, num_warps=4)
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0][-1] == {"BLOCK": 8, "WIDE": True, "num_warps": 4}
    grids_and_numbers = [(call[0], call[3], call[4]) for call in kernel.calls]
    assert grids_and_numbers == [((7, 1, 1), 7, 2.0), ((6, 1, 1), 6, 1.0)]
    assert all(
        call[1] is X and call[2] is None and call[5:] == (True, 8) for call in kernel.calls
    )  # in the kernel's order


@pytest.mark.parametrize(
    "other",
    [
        {"x": X.bfloat16()},
        {"x": X[1:]},  # no multiple of 16 bytes
        {"y": None},
        {"n": True},
        {"n": 1},
        {"n": 48},
        {"n": 1 << 31},
        {"n": -(1 << 40) - 1},
        {"n": (1 << 63) + 1},
        {"BLOCK": 16},
        {"WIDE": False},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_another_specialization_is_another_variant(kernel: Kernel, other: dict[str, Any]) -> None:
    usual = {"x": X, "y": X, "n": 5, "BLOCK": 8, "WIDE": True, "num_warps": 4}
    for options in (usual, usual | other, usual, usual | other):
        x, y, n, *_ = options.values()
        launch(kernel, (1,), x, y, n, 0.5, **{name: options[name] for name in ("BLOCK", "WIDE", "num_warps")})
    assert len(kernel.compiled) == 2 and len(kernel.calls) == 2


def test_seeds_share_one_variant(kernel: Kernel) -> None:
    for seed in range(20):
        launch(kernel, (1,), X, X, (seed << 40) | (1 << 62) | 1, 0.5, BLOCK=8, WIDE=True)
    assert len(kernel.compiled) == 1 and len(module._COMPILED) == 1


def test_two_kernels_have_variants_of_their_own(kernel: Kernel) -> None:
    other = Kernel()
    for one in (kernel, other):
        launch(one, (1,), X, X, 5, 0.5, BLOCK=8, WIDE=True)
    assert len(kernel.compiled) == len(other.compiled) == 1


def test_nothing_is_kept_where_nothing_was_compiled(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Triton's interpreter."""
    monkeypatch.delattr(Variant, "packed_metadata")
    for _ in range(2):
        launch(kernel, (1,), X, X, 5, 0.5, BLOCK=8, WIDE=True)
    assert len(kernel.compiled) == 2 and not module._COMPILED
