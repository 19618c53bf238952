"""Policies are data: a default, selectors of which later ones win, precise errors."""

import dataclasses
import pickle
import re

import pytest
import torch

from fxopt.precision.policy import Policy, PolicyError, Precision, Selector
from fxopt.precision.presets import policies
from fxopt.precision.roles import Role

FP32, BF16, INT8, FP8 = torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn
DEFAULT = Precision(BF16, BF16, BF16, "stochastic", "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": torch.float16}, r"Precision\.storage must be one of torch\.float32, torch\.bfloat16, torch\.int8"),
        ({"storage": "bf16"}, r"Precision\.storage must be one of"),
        ({"compute": torch.float16}, r"Precision\.compute must be one of"),
        ({"gradient": INT8}, r"Precision\.gradient must be one of torch\.float32, torch\.bfloat16"),
        ({"rounding": "stochastik"}, r"Precision\.rounding must be one of .*nearest: 'stochastic'"),
        ({"optimizer_state": "8bits"}, r"Precision\.optimizer_state must be one of .*nearest: '8bit'"),
        ({"storage": INT8, "compute": FP8}, r"storage int8 with compute float8_e4m3fn cannot work.*use compute="),
        ({"storage": FP32, "rounding": "kahan"}, r"needless for storage float32: use rounding='nearest'"),
        ({"storage": INT8, "rounding": "kahan"}, r"cannot work for storage int8: use rounding='stochastic'"),
        ({"cast": "stochastic"}, r"from bfloat16 to bfloat16: use cast='nearest'"),
    ],
)
def test_a_precision_that_cannot_work_says_what_does(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        dataclasses.replace(DEFAULT, **changes)  # type: ignore[arg-type]


def test_int8_rounded_to_nearest_is_lossy_and_allowed() -> None:
    assert dataclasses.replace(DEFAULT, storage=INT8, rounding="nearest").bytes_per_parameter == 1


def test_a_policy_is_immutable_hashable_and_pickles() -> None:
    for policy in policies().values():
        assert pickle.loads(pickle.dumps(policy)) == policy
        assert hash(policy) == hash(pickle.loads(pickle.dumps(policy)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.name = "mine"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Policy("mine", BF16), r"Policy\.default must be a Precision"),
        (lambda: Policy("mine", DEFAULT, ("norm",)), r"Policy\.selectors must be Selectors"),
        (lambda: Policy("mine", dataclasses.replace(DEFAULT, storage=INT8)), r"can be neither int8 nor float8"),
        (lambda: Policy("mine", dataclasses.replace(DEFAULT, compute=FP8)), r"give these to Selector\(role='linear'"),
        (lambda: Selector(storage=FP32), r"exactly one of role, name and trainable, got none"),
        (lambda: Selector(role="norm", name="a", storage=FP32), r"exactly one of .* got role='norm', name='a'"),
        (lambda: Selector(role="nrom", storage=FP32), r"unknown role 'nrom'; nearest: 'norm'"),
        (lambda: Selector(role="norm"), r"selector role='norm' overrides nothing"),
        (lambda: Selector(role="norm", storage=torch.float64), r"selector role='norm': storage must be one of"),
        (
            lambda: Selector(role="norm", compute=FP8),
            r"role 'norm' cannot compute in float8_e4m3fn.*select role='linear'",
        ),
        (lambda: Selector(role="bias", storage=INT8), r"role 'bias' cannot be stored in int8.*float32 or bfloat16"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written(build: object, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        build()  # type: ignore[operator]


def test_later_selectors_win() -> None:
    policy = Policy(
        "mine",
        DEFAULT,
        (
            Selector(role=Role.LINEAR, optimizer_state="8bit"),
            Selector(name="layers.*.mlp.*", optimizer_state="4bit"),
            Selector(trainable=False, rounding="nearest"),
        ),
    )
    assert policy.precision("head.weight", Role.OUTPUT_HEAD) == DEFAULT
    assert policy.precision("layers.0.attn.weight", Role.LINEAR).optimizer_state == "8bit"
    assert policy.precision("layers.0.mlp.weight", Role.LINEAR).optimizer_state == "4bit"
    assert policy.precision("tied", Role.LINEAR, also_named=["layers.0.mlp.w"]).optimizer_state == "4bit"
    assert policy.precision("layers.0.attn.weight", Role.LINEAR, trainable=False).rounding == "nearest"


def test_gradient_and_rounding_follow_a_new_storage() -> None:
    policy = Policy.named("bf16").with_selectors(Selector(role="embedding", storage=FP32))
    assert policy.name == "bf16-custom"
    assert policy.precision("wte", Role.EMBEDDING) == Precision(FP32, BF16, FP32, "nearest", "float32")
    back = policy.with_selectors(Selector(name="wte", storage=BF16))
    assert back.name == "bf16-custom"
    assert back.precision("wte", Role.EMBEDDING) == DEFAULT
    narrow = Policy.named("mixed-stochastic").with_selectors(Selector(role="linear", storage=BF16))
    assert narrow.precision("w", Role.LINEAR) == DEFAULT  # the stochastic cast has nothing to cast


def test_a_selector_that_asks_a_norm_for_float8_names_the_parameter() -> None:
    policy = Policy("mine", DEFAULT, (Selector(name="model.*", compute=FP8),))
    assert policy.precision("model.proj", Role.LINEAR).compute == FP8
    with pytest.raises(PolicyError, match=r"name='model\.\*' matches 'model\.norm', and role 'norm' cannot compute"):
        policy.precision("model.norm", Role.NORM)


def test_what_the_author_keeps_in_float32_is_an_island_unless_a_name_says_otherwise() -> None:
    policy = Policy.named("bf16")
    kept = policy.precision("a.weight", Role.ROUTER, kept_in=FP32)
    assert kept == Precision(FP32, FP32, FP32, "nearest", "float32")
    named = policy.with_selectors(Selector(name="a.*", storage=BF16))
    assert named.precision("a.weight", Role.ROUTER, kept_in=FP32) == DEFAULT


ROLES = {"model.layers.0.norm.weight": Role.NORM, "model.layers.0.proj.weight": Role.LINEAR, "wte": Role.EMBEDDING}


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    policy = Policy.named("bf16").with_selectors(Selector(name="model.layers.*.nrom.weight", storage=FP32))
    expected = "selector 'model.layers.*.nrom.weight' matches no parameter; nearest: 'model.layers.*.norm.weight'"
    with pytest.raises(PolicyError, match=re.escape(expected)):
        policy.check_selectors(ROLES)


def test_a_role_that_matches_nothing_is_an_error_of_the_user_and_none_of_a_preset() -> None:
    Policy.named("mixed").check_selectors(ROLES)  # selects routers
    policy = Policy.named("bf16").with_selectors(Selector(role="router", storage=FP32))
    with pytest.raises(
        PolicyError, match=r"role='router' matches no parameter; roles in this model: embedding, linear"
    ):
        policy.check_selectors(ROLES)


def test_diff_is_data_and_reads_well() -> None:
    old, new = Policy.named("bf16"), Policy.named("bf16-8bit")
    diff = old.diff(new)
    assert [(c.where, c.field, c.old, c.new) for c in diff.changes] == [
        ("default", "optimizer_state", "float32", "8bit"),
        ("role='norm'", None, None, "storage=float32, compute=float32, optimizer_state=float32"),
    ]
    assert "default optimizer_state: float32 → 8bit" in str(diff)
    assert not old.diff(old) and "no difference" in str(old.diff(old))
    first, second = Selector(role="norm", storage=FP32), Selector(role="linear", rounding="kahan")
    turned = Policy("a", DEFAULT, (first, second)).diff(Policy("a", DEFAULT, (second, first)))
    assert [change.where for change in turned.changes] == ["order of selectors"]


def test_print_is_a_table() -> None:
    lines = str(Policy.named("int8")).splitlines()
    assert lines[0] == "policy int8"
    assert lines[1].split() == ["storage", "compute", "gradient", "rounding", "optimizer_state", "cast"]
    assert lines[3].split() == ["role='norm'", "float32", "float32", "float32"]
    assert max(map(len, lines)) < 100
