"""What a user is warned of once when a model is called: the call is run as it is, and is not what he may think."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fxopt.rewrite.report import Report
from fxopt.training_call import Call, follows_transformers, is_autocast, would_cache


def look_at_call(report: Report, model: nn.Module, call: Call, *, is_first: bool) -> None:
    """Warns of what this call of `model` has for the first time, and notes it in `report`.

    `is_first`: it is the first of its kind, and may wait for the device.
    """
    if is_first and not report.autocast and is_autocast():
        report.autocast = True
        _warn(
            f"{report.model} is called under autocast, beside fxopt's policy {report.policy!r}, which has chosen the "
            "precision already: autocast casts once more in each call, and the output is converted to float32. Turn it "
            "off: bf16=False and fp16=False in TrainingArguments (TRL turns bf16 on by itself), mixed_precision='no' "
            "in Accelerator, precision='32-true' in Lightning"
        )
    if not report.attends_across_documents and _attends_across_documents(model, call, is_first):
        report.attends_across_documents = True
        _warn(
            f"{report.model} is called with packed rows (position_ids start anew within a row), and its tokens attend "
            "to the documents before their own: transformers keeps these apart only without a cache and without a "
            "mask, and config.use_cache is True. fxopt runs the call as transformers does. Write "
            "`model.config.use_cache = False` before training, or pass use_cache=False, and leave attention_mask out"
        )


def _attends_across_documents(model: nn.Module, call: Call, may_wait: bool) -> bool:
    """Whether positions start anew within a row, and transformers takes the row for one document all the same.

    Source: `transformers.masking_utils._preprocess_mask_arguments`, 5.17 to 5.24.
    """
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or not follows_transformers(model):
        return False
    if positions.device.type != "cpu" and not may_wait:
        return False
    restarts: Any = positions.diff(dim=-1) <= 0
    if isinstance(mask, torch.Tensor):
        if mask.ndim != 2:
            return False  # the caller's own
        restarts = restarts & (mask[:, 1:] == 1) & (mask[:, :-1] == 1)  # not what is padding
    else:
        uses_cache = would_cache(model) if call.get("use_cache") is None else bool(call["use_cache"])
        by_positions = str(getattr(getattr(model, "config", None), "_attn_implementation", "")).startswith("flash")
        if not uses_cache or by_positions:
            return False
    return bool(restarts.any())


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
