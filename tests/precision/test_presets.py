"""The presets by name, and the choice among them."""

import pytest
import torch
from torch import nn

from fxopt.precision import presets
from fxopt.precision.policy import Policy, PolicyError
from fxopt.precision.presets import choose, limits, policies, resolve

ALL = ["fp32", "mixed", "mixed-stochastic", "bf16", "bf16-islands", "bf16-8bit", "int8", "fp8"]


def test_presets() -> None:
    assert list(policies()) == ALL
    assert all(name == policy.name for name, policy in policies().items())
    assert [p.default.bytes_per_parameter for p in policies().values()] == [4, 4, 4, 2, 2, 2, 2, 2]
    assert policies()["mixed"].diff(policies()["mixed-stochastic"]).changes[0].field == "cast"


def test_resolve_takes_a_name_or_a_policy() -> None:
    policy = Policy.named("bf16")
    assert resolve("bf16") == policy
    assert resolve(policy) is policy


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bf61", r"unknown policy 'bf61'; nearest: 'bf16'; known: fp32, mixed"),
        ("BF16", r"unknown policy 'BF16'; nearest: 'bf16'"),
        ("zzzzzz", r"unknown policy 'zzzzzz'; known: fp32"),
        ("auto", r"'auto' is a choice for one model"),
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
    ("memory_bytes", "name"), [(2000e6, "bf16-islands"), (1100e6, "bf16-8bit"), (900e6, "int8"), (1e6, "int8")]
)
def test_the_choice_follows_memory(memory_bytes: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "device_memory", lambda device: int(memory_bytes))
    with torch.device("meta"):
        model = nn.Linear(10_000, 10_000, bias=False)
    policy, why = choose(model, "cpu")
    assert policy.name == name == resolve("auto", model).name
    assert why.count(". ") == 1 and name in why
    assert ("do not fit" in why) == (memory_bytes == 1e6)


def test_frozen_parameters_need_no_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "device_memory", lambda device: int(400e6))
    with torch.device("meta"):
        model = nn.Linear(10_000, 10_000, bias=False).requires_grad_(False)
    assert choose(model, "cpu")[0].name == "bf16-islands"


def test_the_limits_are_where_the_choice_changes():
    edges = limits("cpu")
    for name, number in list(edges.items())[:-1]:
        for change, chosen in ((0.99, name), (1.01, None)):
            model = torch.nn.Module()
            model.weight = torch.nn.Parameter(torch.empty(int(change * number), device="meta"))
            policy, _ = choose(model, "cpu")
            assert policy.name == (chosen or list(edges)[list(edges).index(name) + 1])
