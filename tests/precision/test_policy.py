"""Policies are data: presets by name, precise errors."""

import dataclasses
import pickle

import pytest
import torch

from fxopt.precision.policy import Policy, PolicyError, Precision, policies, resolve
from fxopt.precision.roles import Role


def test_presets() -> None:
    presets = policies()
    assert list(presets) == ["fp32", "bf16"]
    assert all(name == policy.name for name, policy in presets.items())
    bf16 = presets["bf16"].default
    assert (bf16.storage, bf16.rounding, bf16.optimizer_state) == (torch.bfloat16, "stochastic", torch.float32)
    assert [policy.default.bytes_per_parameter for policy in presets.values()] == [4, 2]


def test_resolve_takes_a_name_or_a_policy() -> None:
    policy = Policy.named("bf16")
    assert resolve("bf16") == policy
    assert resolve(policy) is policy


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bf61", r"unknown policy 'bf61'; nearest: 'bf16'; known: fp32, bf16"),
        ("BF16", r"unknown policy 'BF16'; nearest: 'bf16'"),
        ("zzzzzz", r"unknown policy 'zzzzzz'; known: fp32, bf16"),
    ],
)
def test_an_unknown_name_says_what_is_near(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        resolve(name)


@pytest.mark.parametrize("policy", [torch.bfloat16, None, 16])
def test_another_type_is_refused(policy: object) -> None:
    with pytest.raises(TypeError, match="policy must be a Policy or the name of one"):
        resolve(policy)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("storage", torch.int8),
        ("storage", "bf16"),
        ("compute", torch.float16),
        ("rounding", "up"),
        ("optimizer_state", torch.bfloat16),
    ],
)
def test_a_precision_that_cannot_work_is_refused(field: str, value: object) -> None:
    with pytest.raises(PolicyError, match=rf"Precision\.{field} must be"):
        dataclasses.replace(Policy.named("bf16").default, **{field: value})  # type: ignore[arg-type]


def test_a_policy_is_immutable_and_pickles() -> None:
    policy = Policy.named("bf16")
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.name = "mine"  # type: ignore[misc]
    with pytest.raises(PolicyError, match=r"Policy\.default must be a Precision"):
        Policy("mine", torch.bfloat16)  # type: ignore[arg-type]


def test_what_the_author_keeps_in_float32_is_an_island() -> None:
    policy = Policy.named("bf16")
    assert policy.precision("a.weight", Role.LINEAR) == policy.default
    kept = policy.precision("a.weight", Role.ROUTER, kept_in=torch.float32)
    assert kept == Precision(torch.float32, torch.float32, "nearest", torch.float32)
