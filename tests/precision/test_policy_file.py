"""Policies in files: exact both ways, data only, nothing unknown."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from fxopt.precision.policy import Policy, PolicyError, Selector
from fxopt.precision.presets import policies

MINE = Policy.named("mixed-stochastic").with_selectors(
    Selector(name="model.layers.*.mlp.*", optimizer_state="8bit", rounding="nearest"),
    Selector(trainable=False, storage=torch.bfloat16),
    Selector(role="linear", compute=torch.float8_e4m3fn),
)


@pytest.mark.parametrize("policy", [*policies().values(), MINE], ids=lambda policy: policy.name)
def test_round_trip_is_exact(policy: Policy, tmp_path: Path) -> None:
    assert Policy.from_json(policy.to_json()) == policy
    assert Policy.from_yaml(policy.to_yaml()) == policy
    for suffix in (".json", ".yaml", ".yml"):
        assert Policy.load(policy.save(tmp_path / f"policy{suffix}")) == policy


def test_files_are_written_for_people() -> None:
    data = yaml.safe_load(MINE.to_yaml())
    assert data == json.loads(MINE.to_json())
    assert data["selectors"][-2:] == [
        {"trainable": False, "storage": "bfloat16"},
        {"role": "linear", "compute": "float8_e4m3fn"},
    ]


def changed(**changes: object) -> str:
    return json.dumps({**json.loads(Policy.named("bf16").to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a policy must be a mapping of name, default, selectors; got list"),
        (changed(selektors=[]), "a policy has an unknown key 'selektors'; nearest: 'selectors'"),
        (changed(default={"storage": "bfloat16"}), "default lacks compute, gradient, rounding, optimizer_state"),
        (changed(selectors={"role": "norm"}), "selectors must be a list"),
        (changed(selectors=[{"role": "norm", "storrage": "float32"}]), r"selectors\[0\] has an unknown key 'storrage'"),
        (changed(selectors=[{"role": "norm", "storage": "fp32"}]), r"selectors\[0\]: .*storage must be one of"),
        (changed(selectors=[{"role": "norm", "storage": "save"}]), r"selectors\[0\]: .*storage must be one of"),
        (changed(selectors=[{"role": "nrom", "storage": "float32"}]), r"selectors\[0\]: unknown role 'nrom'"),
        (changed(name=3), r"Policy\.name must be a str"),
        ('{"name": "a", "name": "b"}', "the key 'name' stands twice"),
    ],
)
def test_what_is_no_policy_is_refused(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy.from_json(text)


def test_yaml_runs_no_code() -> None:
    with pytest.raises(PolicyError, match="not YAML of plain data"):
        Policy.from_yaml("!!python/object/apply:os.getcwd []")


@pytest.mark.parametrize("text", ["name: a\nname: b", "name: a\ndefault: {storage: float32, storage: bfloat16}"])
def test_yaml_keeps_no_key_of_two(text: str) -> None:
    with pytest.raises(PolicyError, match="stands twice"):
        Policy.from_yaml(text)


def test_yaml_of_odd_keys_is_refused_too() -> None:
    with pytest.raises(PolicyError):
        Policy.from_yaml("? [name, default]\n: 1")


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine")
    with pytest.raises(PolicyError, match=r"mine\.yaml: a policy lacks default"):
        Policy.load(path)
    with pytest.raises(PolicyError, match=r"named \.json, \.yaml or \.yml"):
        MINE.save(tmp_path / "policy.txt")
