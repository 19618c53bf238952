"""Vision–language models train on pictures as they did, with all of the text's path in one graph."""

import re
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import fxopt

VOCABULARY, IMAGE, START, END = 300, 290, 288, 289


def llava() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, bos_token_id=1, eos_token_id=2)
    batches = [text_with_pictures() | {"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(3)]
    return LlavaForConditionalGeneration(config), batches


def qwen() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "fullatt_block_indexes": [0], "window_size": 16,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    batches = [text_with_pictures() for _ in range(3)]
    for batch in batches:
        batch["pixel_values"] = torch.randn(32, 3 * 2 * 4 * 4)  # rows of 2 × 4 × 4 pixels, for both pictures
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    return Qwen2_5_VLForConditionalGeneration(config), batches


def text_with_pictures() -> dict[str, Tensor]:
    """Two rows of 24 tokens with one picture of four tokens in each, which have no label."""
    ids = torch.randint(3, IMAGE - 10, (2, 24))
    ids[:, 5], ids[:, 6:10], ids[:, 10] = START, IMAGE, END
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids >= START, -100),
    }


TEXT = {"rms_norm": 5, "add_rms_norm": 4, "rope": 4, "swiglu": 2, "linear_cross_entropy": 1}


@pytest.mark.parametrize(
    ("made", "of_pictures", "one_graph"),
    [
        (llava, {"layer_norm": 8, "add_layer_norm": 5, "causal_attention": 2}, True),
        (qwen, {"rms_norm": 3, "add_rms_norm": 1, "rope": 2, "swiglu": 1}, False),
    ],
    ids=["llava", "qwen2.5-vl"],
)
def test_a_step_with_pictures(made, of_pictures, one_graph):
    torch.manual_seed(0)
    model, batches = made()
    model = fxopt.optimize(model, "fp32")
    outcome = fxopt.verify(model, *batches)
    assert outcome.holds, outcome.failures
    report = fxopt.report(model)
    assert report.hits == Counter(TEXT) + Counter(of_pictures) and not report.fallbacks
    # Where the places of pictures are read as Python's numbers, Dynamo breaks the graph: before the text's layers.
    (text,) = [graph for graph in report.graphs if "linear_cross_entropy" in graph.hits()]
    assert Counter(TEXT) <= Counter(text.hits())
    attentions = [node for node in text.after if node.operation == "scaled_dot_product_attention"]
    assert not any("mask" in name for node in attentions for name in node.inputs)
    assert (len(report.graphs) == 1) == one_graph
    assert all(re.match(r"\w+\.py:\d+: .", where) for where in report.graph_breaks)
