"""What the meter counts, on small functions."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fxopt.inspection.meter import Meter


def test_what_a_checkpoint_runs_again_is_not_written_over():
    """Gradients are added in place; a sum of the forward, of two dtypes too, is not, also when backward runs it."""

    def body(x):
        return (x.exp() + x.float().exp()).sin()

    meter = Meter()
    with FakeTensorMode():
        x = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
        meter.ignore(x)
        with meter:
            loss = checkpoint(body, x, use_reentrant=False).sum()
            meter.end_forward()
            loss.backward()
    assert x.grad.dtype == torch.bfloat16
