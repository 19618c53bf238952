"""What a user is warned of when a model is called: once, and the report repeats it."""

import warnings

import pytest
import torch

import fxopt
from fxopt.call_warnings import look_at_call
from fxopt.rewrite.report import Report
from tests.tiny_models import tiny_batch, tiny_llama

PACKED = torch.arange(4).repeat(2, 2)
ONE_DOCUMENT = torch.arange(8).repeat(2, 1)
ONES = torch.ones(2, 8, dtype=torch.int64)
PADDED_LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4]])


def warned(options: dict[str, object], *, times: int = 1, config: dict[str, object] | None = None) -> int:
    model, report = tiny_llama(num_hidden_layers=1), Report("LlamaForCausalLM", "bf16")
    for name, value in (config or {}).items():
        setattr(model.config, name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            look_at_call(report, model, {"input_ids": ONES, **options}, is_first=True)
    assert report.attends_across_documents == bool(caught)
    assert ("use_cache = False" in str(report)) == bool(caught)
    return len(caught)


@pytest.mark.parametrize(
    "options",
    [{}, {"attention_mask": None}, {"attention_mask": ONES}, {"attention_mask": ONES, "use_cache": False}],
    ids=["", "None", "ones", "ones, no cache"],
)
def test_packed_rows_that_leak(options):
    assert warned({"position_ids": PACKED, **options}, times=3) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_ids": ONE_DOCUMENT},
        {"position_ids": PACKED, "use_cache": False},
        {"position_ids": PACKED, "attention_mask": torch.ones(2, 1, 8, 8)},
        {"attention_mask": PADDED_LEFT[0], "position_ids": PADDED_LEFT[1]},
        {"position_ids": PACKED.expand(3, 2, 8)},
    ],
    ids=["no positions", "one document", "no cache", "a mask of one's own", "padding", "three axes"],
)
def test_rows_that_do_not(options):
    assert warned(options) == 0


@pytest.mark.parametrize("config", [{"use_cache": False}, {"_attn_implementation_internal": "flash_attention_2"}])
def test_configurations_that_keep_documents_apart(config):
    assert warned({"position_ids": PACKED}, config=config) == 0


def test_a_call_of_packed_rows_warns_and_stays_what_it_was():
    model = fxopt.optimize(tiny_llama(num_hidden_layers=1), "fp32", prove=False)
    batch = {name: value for name, value in tiny_batch(length=8).items() if name != "attention_mask"}
    with pytest.warns(UserWarning, match=r"position_ids start anew within a row.*model.config.use_cache = False"):
        leaking = model(**batch, position_ids=torch.arange(4).repeat(3, 2)).loss
    assert "packed rows" in str(fxopt.report(model))
    apart = model(**batch, position_ids=torch.arange(4).repeat(3, 2), use_cache=False).loss
    assert (leaking - apart).abs() > 1e-4
