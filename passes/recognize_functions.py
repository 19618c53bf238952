"""What models write out by hand  →  the function of torch that it is, which the fusions know.

Each saves a few operations and roundings also where nothing is fused afterwards. None is missed: what is nearly one of
them is something else.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.rewrite.graph import dtype_of, shape_of, value_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass
from fxopt.rewrite.sample import Example, examples_of_labels


def check_numbers(**numbers: tuple[Any, float]) -> None:
    """Decline where a literal of the code is not the number that the formula has, to ten digits."""
    for name, (found, wanted) in numbers.items():
        close = isinstance(found, int | float) and math.isclose(found, wanted, rel_tol=1e-10)
        require(close, f"the {name} is {found}, not {wanted:.6g}")


class RecognizeReciprocalRoot(Rule):
    """x / sqrt(variance + eps)  →  x * rsqrt(variance + eps)

    Source: norms outside transformers, as in x-transformers and in textbooks.
    """

    op = "rsqrt"
    nearly = 1.0

    @staticmethod
    def pattern(x: Any, variance: Any, eps: Any) -> Any:
        return x / torch.sqrt(variance + eps)

    @staticmethod
    def check(x: Any, variance: Any, eps: Any) -> None:
        require(isinstance(x, fx.Node) and x is not variance, "")
        check_variance(variance, eps)

    @staticmethod
    def examples() -> dict[str, Example]:
        def positive(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator).square().to(dtype)

        return {"variance": positive}

    @staticmethod
    def rewrite(x: Any, variance: Any, eps: Any) -> Any:
        return x * torch.rsqrt(variance + eps)


def check_variance(variance: Any, eps: Any) -> None:
    require(isinstance(eps, int | float), f"{eps} is added to the variance, not a number")
    require(shape_of(variance)[-1:] == (1,) and value_of(variance).is_floating_point(), "")  # not a norm of rows


class RecognizeOneByRoot(RecognizeReciprocalRoot):
    """1 / sqrt(variance + eps)  →  rsqrt(variance + eps)"""

    @staticmethod
    def pattern(one: Any, variance: Any, eps: Any) -> Any:
        return one / torch.sqrt(variance + eps)

    @staticmethod
    def check(one: Any, variance: Any, eps: Any) -> None:
        require(isinstance(one, int | float) and one == 1, "")
        check_variance(variance, eps)

    @staticmethod
    def rewrite(variance: Any, eps: Any) -> Any:
        return torch.rsqrt(variance + eps)


class RecognizeReciprocalOfRoot(RecognizeOneByRoot):
    """sqrt(variance + eps).reciprocal()  →  rsqrt(variance + eps)"""

    @staticmethod
    def pattern(variance: Any, eps: Any) -> Any:
        return torch.reciprocal(torch.sqrt(variance + eps))

    check = staticmethod(check_variance)  # type: ignore[assignment]


class RecognizeMean(Rule):
    """sum(x) / n  →  mean(x), over the last axis"""

    op = "mean"
    nearly = 1.0

    @staticmethod
    def pattern(x: Any, count: Any) -> Any:
        return x.sum(-1, keepdim=True) / count

    @staticmethod
    def check(x: fx.Node, count: Any) -> None:
        require(type(count) is int and count > 0 and shape_of(x)[-1:] == (count,), "")
        require(value_of(x).is_floating_point(), "")  # a mean of integers is none to torch

    @staticmethod
    def rewrite(x: Any) -> Any:
        return torch.mean(x, -1, keepdim=True)


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (..., 1): sqrt(mean(x²)); at 0 its gradient is 0, as that of `torch.norm`."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5


class RecognizeRootMeanSquare(Rule):
    """sqrt(mean(x²))  →  root_mean_square(x), over the last axis"""

    op = "root_mean_square"
    nearly = 1.0
    has_gradient_at_zero = False

    @staticmethod
    def pattern(x: Any) -> Any:
        return torch.sqrt(torch.square(x).mean(-1, keepdim=True))

    @staticmethod
    def check(x: fx.Node) -> None:
        width = shape_of(x)[-1]
        require(value_of(x).is_floating_point() and isinstance(width, int) and width > 0, "")

    @staticmethod
    def rewrite(x: Any) -> Any:
        return root_mean_square(x)


class RecognizeScaledNorm(RecognizeRootMeanSquare):
    """norm(x) * D^-½  →  root_mean_square(x)

    Source: the authors' RMSNorm, rmsnorm_torch.RMSNorm.forward.
    """

    has_gradient_at_zero = True

    @staticmethod
    def pattern(x: Any, factor: Any) -> Any:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True) * factor

    @staticmethod
    def check(x: fx.Node, factor: Any) -> None:
        RecognizeRootMeanSquare.check(x)
        check_numbers(factor=(factor, shape_of(x)[-1] ** -0.5))


class RecognizeDividedNorm(RecognizeScaledNorm):
    """norm(x) / √D  →  root_mean_square(x)"""

    @staticmethod
    def pattern(x: Any, root: Any) -> Any:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True) / root

    @staticmethod
    def check(x: fx.Node, root: Any) -> None:
        RecognizeRootMeanSquare.check(x)
        check_numbers(root=(root, shape_of(x)[-1] ** 0.5))


class RecognizeSiLU(Rule):
    """x * sigmoid(x)  →  silu(x)"""

    op = "silu"
    nearly = 1.0

    @staticmethod
    def pattern(x: Any) -> Any:
        return x * torch.sigmoid(x)

    @staticmethod
    def check(x: fx.Node) -> None:
        require(value_of(x).is_floating_point(), "")

    @staticmethod
    def rewrite(x: Any) -> Any:
        return F.silu(x)


class RecognizeGELU(Rule):
    """x / 2 * (1 + erf(x / √2))  →  gelu(x)

    Source: transformers.activations.GELUActivation._gelu_python.
    """

    op = "gelu"
    nearly = 0.9  # all of it

    @staticmethod
    def pattern(x: Any, half: Any, one: Any, root: Any) -> Any:
        return x * half * (torch.erf(x / root) + one)

    @staticmethod
    def check(x: fx.Node, half: Any, one: Any, root: Any) -> None:
        check_numbers(factor=(half, 0.5), summand=(one, 1.0), root=(root, math.sqrt(2.0)))
        check_accuracy_of_gelu(x)

    @staticmethod
    def rewrite(x: Any) -> Any:
        return F.gelu(x)


def check_accuracy_of_gelu(x: fx.Node) -> None:
    is_less_accurate = value_of(x).device.type == "cpu" and dtype_of(x) == torch.float32
    require(not is_less_accurate, "on a CPU torch's gelu of float32 is less accurate than the formula")


class RecognizeGELUOfProduct(RecognizeGELU):
    """x / 2 * (1 + erf(x * 1/√2))  →  gelu(x)"""

    @staticmethod
    def pattern(x: Any, half: Any, one: Any, root: Any) -> Any:
        return x * half * (torch.erf(x * root) + one)

    @staticmethod
    def check(x: fx.Node, half: Any, one: Any, root: Any) -> None:
        check_numbers(factor=(half, 0.5), summand=(one, 1.0), root=(root, math.sqrt(0.5)))
        check_accuracy_of_gelu(x)


class RecognizeTanhGELU(Rule):
    """x / 2 * (1 + tanh(√(2/π) * (x + 0.044715 x³)))  →  gelu(x), by tanh

    Source: transformers.activations.NewGELUActivation.
    """

    op = "gelu_tanh"
    nearly = 1.0

    @staticmethod
    def pattern(x: Any, half: Any, one: Any, root: Any, cubic: Any, three: Any) -> Any:
        return x * half * (torch.tanh((x + torch.pow(x, three) * cubic) * root) + one)

    @staticmethod
    def check(half: Any, one: Any, root: Any, cubic: Any, three: Any) -> None:
        check_numbers(
            factor=(half, 0.5), summand=(one, 1.0), root=(root, math.sqrt(2.0 / math.pi)), cubic=(cubic, 0.044715),
            exponent=(three, 3.0),
        )  # fmt: skip

    @staticmethod
    def rewrite(x: Any) -> Any:
        return F.gelu(x, approximate="tanh")


class RecognizeFactoredTanhGELU(RecognizeTanhGELU):
    """x / 2 * (1 + tanh(x * √(2/π) * (1 + 0.044715 x * x)))  →  gelu(x), by tanh

    Source: transformers.activations.FastGELUActivation.
    """

    @staticmethod
    def pattern(x: Any, half: Any, one: Any, root: Any, cubic: Any) -> Any:
        return x * half * (torch.tanh(x * root * (x * cubic * x + one)) + one)

    @staticmethod
    def check(half: Any, one: Any, root: Any, cubic: Any) -> None:
        RecognizeTanhGELU.check(half, one, root, cubic, 3)


class RecognizeLinear(Rule):
    """hidden @ weight.t()  →  linear(hidden, weight)"""

    op = "linear"
    nearly = 1.0

    @staticmethod
    def pattern(hidden: Any, weight: Any) -> Any:
        return torch.matmul(hidden, weight.t())

    @staticmethod
    def check(hidden: fx.Node, weight: fx.Node) -> None:
        require(len(shape_of(weight)) == 2 and len(shape_of(hidden)) > 1, "a factor has another number of axes")

    @staticmethod
    def rewrite(hidden: Any, weight: Any) -> Any:
        return F.linear(hidden, weight)


class RecognizeCrossEntropy(Rule):
    """nll_loss(log_softmax(rows), labels)  →  cross_entropy(rows, labels)"""

    op = "cross_entropy"
    nearly = 1.0

    @staticmethod
    def pattern(rows: Any, labels: Any, ignore_index: Any, reduction: Any) -> Any:
        return F.nll_loss(torch.log_softmax(rows, -1), labels, ignore_index=ignore_index, reduction=reduction)

    @staticmethod
    def check(rows: fx.Node) -> None:
        require(len(shape_of(rows)) == 2, "the classes are not the last of two axes")

    @staticmethod
    def examples(rows: torch.Tensor, ignore_index: int) -> dict[str, list[Example]]:
        return examples_of_labels(rows.shape[-1], ignore_index)

    @staticmethod
    def rewrite(rows: Any, labels: Any, ignore_index: Any, reduction: Any) -> Any:
        return F.cross_entropy(rows, labels, ignore_index=ignore_index, reduction=reduction)


class RecognizeCrossEntropyBeforeView(RecognizeCrossEntropy):
    """The same where the logits become rows in between"""

    @staticmethod
    def pattern(logits: Any, vocabulary: Any, labels: Any, ignore_index: Any, reduction: Any) -> Any:
        rows = torch.log_softmax(logits, -1).view(-1, vocabulary)
        return F.nll_loss(rows, labels, ignore_index=ignore_index, reduction=reduction)

    @staticmethod
    def check(logits: fx.Node, vocabulary: Any) -> None:
        require(shape_of(logits)[-1:] == (vocabulary,), f"the logits are viewed as rows of {vocabulary}")

    @staticmethod
    def examples(logits: torch.Tensor, ignore_index: int) -> dict[str, list[Example]]:
        return examples_of_labels(logits.shape[-1], ignore_index)

    @staticmethod
    def rewrite(logits: Any, vocabulary: Any, labels: Any, ignore_index: Any, reduction: Any) -> Any:
        rows = logits.reshape((-1, vocabulary))
        return F.cross_entropy(rows, labels, ignore_index=ignore_index, reduction=reduction)


RECOGNIZE_FUNCTIONS = rules_pass(
    "recognize_functions",
    RecognizeReciprocalRoot,
    RecognizeOneByRoot,
    RecognizeReciprocalOfRoot,
    RecognizeMean,
    RecognizeRootMeanSquare,
    RecognizeScaledNorm,
    RecognizeDividedNorm,
    RecognizeSiLU,
    RecognizeGELU,
    RecognizeGELUOfProduct,
    RecognizeTanhGELU,
    RecognizeFactoredTanhGELU,
    RecognizeLinear,
    RecognizeCrossEntropy,
    RecognizeCrossEntropyBeforeView,
)
