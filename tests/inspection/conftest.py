"""Inspections that several tests look at, made once."""

import pytest

import fxopt
from fxopt.inspection.diff import GraphDiff
from tests.tiny_models import SIZES


@pytest.fixture(scope="session")
def diff() -> GraphDiff:
    """A Llama of four layers, from its configuration."""
    from transformers import LlamaConfig

    return fxopt.inspect(LlamaConfig(**SIZES | {"num_hidden_layers": 4}), batch_size=2, sequence_length=33)
