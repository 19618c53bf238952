"""Write a rule of your own: the quick GELU of CLIP and its kin as one op that saves one tensor instead of three.

A rule is three small functions: the code to find, as it stands in the modelling file; the words in which it declines;
the op that takes its place. fxopt finds the places, proves each one, forward and backward, and reports.
"""

from typing import Any

import torch
from torch import fx
from transformers import GPT2Config, GPT2LMHeadModel

import fxopt
from fxopt.passes.pipelines import EXACT
from fxopt.rewrite.graph import dtype_of
from fxopt.rewrite.match import Rule, require


@torch.library.custom_op("examples::quick_gelu", mutates_args=())
def _quick_gelu(x: torch.Tensor, alpha: float) -> torch.Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return (h * torch.sigmoid(alpha * h)).to(x.dtype)


@_quick_gelu.register_fake
def _(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
    x, ctx.alpha = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
    (x,) = ctx.saved_tensors
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    sigmoid = torch.sigmoid(ctx.alpha * h)
    return (dy * sigmoid * (1 + ctx.alpha * h * (1 - sigmoid))).to(x.dtype), None


_quick_gelu.register_autograd(_backward, setup_context=_save)


def quick_gelu(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """x * sigmoid(alpha * x), of any shape."""
    return _quick_gelu(x, alpha)


class FuseQuickGELU(Rule):
    """x * sigmoid(alpha * x)

    Source: transformers.activations.QuickGELUActivation.forward.
    """

    @staticmethod
    def pattern(x: Any, alpha: Any) -> Any:
        return x * torch.sigmoid(alpha * x)

    @staticmethod
    def check(x: fx.Node, alpha: Any) -> None:
        require(isinstance(alpha, float), "alpha is not a number")
        require(dtype_of(x) in (torch.bfloat16, torch.float32), f"the input is {dtype_of(x)}")

    @staticmethod
    def rewrite(x: Any, alpha: Any) -> Any:
        return quick_gelu(x, alpha)


torch.manual_seed(0)
config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, activation_function="quick_gelu")
model = fxopt.optimize(GPT2LMHeadModel(config), "bf16", pipeline=EXACT.with_rules(FuseQuickGELU))
tokens = torch.randint(0, config.vocab_size, (4, 32))
model(input_ids=tokens, labels=tokens).loss.backward()

report = fxopt.report(model)
print(report)
assert report.hits["quick_gelu"] == 2, report.hits
