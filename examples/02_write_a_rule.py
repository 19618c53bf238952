"""Write a rule of your own: the squared ReLU of Nemotron as one op that saves one tensor instead of two.

A rule is three small functions: the code to find, as it stands in the modelling file; the words in which it declines;
the op that takes its place. fxopt finds the places, proves each one, forward and backward, and reports.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from transformers import NemotronConfig, NemotronForCausalLM

import fxopt
from fxopt.passes.pipelines import EXACT
from fxopt.rewrite.graph import dtype_of
from fxopt.rewrite.match import Rule, require


@torch.library.custom_op("examples::relu_squared", mutates_args=())
def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return x.relu().square_()


@_relu_squared.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    (x,) = ctx.saved_tensors
    return 2 * x.relu() * dy


_relu_squared.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """relu(x)², of any shape."""
    return _relu_squared(x)


class FuseReLUSquared(Rule):
    """relu(x)²

    Source: transformers.activations.ReLUSquaredActivation.forward.
    """

    @staticmethod
    def pattern(x: Any) -> Any:
        return torch.square(F.relu(x))

    @staticmethod
    def check(x: fx.Node) -> None:
        require(dtype_of(x) in (torch.bfloat16, torch.float32), f"the input is {dtype_of(x)}")

    @staticmethod
    def rewrite(x: Any) -> Any:
        return relu_squared(x)


torch.manual_seed(0)
config = NemotronConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = fxopt.optimize(NemotronForCausalLM(config), "bf16", pipeline=EXACT.with_rules(FuseReLUSquared))
tokens = torch.randint(0, config.vocab_size, (4, 32))
model(input_ids=tokens, labels=tokens).loss.backward()

report = fxopt.report(model)
print(report)
assert report.hits["relu_squared"] == 2, report.hits
