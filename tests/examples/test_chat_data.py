"""Reading datasets of several shapes, and masking what is not the answer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from examples.chat_data import (
    IGNORED,
    LENGTH_MULTIPLE,
    Conversation,
    collator,
    conversation,
    load_conversations,
    tokenize,
)

ASKED = [{"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2 + 2?", "answer": "4"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": ASKED, "completion": [{"role": "assistant", "content": "4"}]},
        {"messages": [*ASKED, {"role": "assistant", "content": "4"}]},
    ],
)
def test_columns(row: dict[str, Any]) -> None:
    assert conversation(row, "data") == Conversation(ASKED, "4")


def test_missing_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"has the columns \['label', 'text'\]; needed are question and answer"):
        conversation({"text": "x", "label": 1}, "data")


@pytest.mark.parametrize("chat", [True, False])
def test_labels_are_the_answer_alone(tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    (example,) = tokenize([Conversation(ASKED, "It is 4.")], tokenizer, chat=chat)
    labelled = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(labelled).strip() == "It is 4.<|im_end|>"
    assert [label for label in example["labels"] if label != IGNORED] == labelled
    assert "2 + 2?" in tokenizer.decode(example["input_ids"])


def test_collator_pads_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    short, long = tokenize([Conversation(ASKED, "4"), Conversation(ASKED, "four, I think")], tokenizer)
    batch = collator(tokenizer)([short, long])
    length = len(short["input_ids"])
    rows, width = batch["input_ids"].shape
    assert (rows, width % LENGTH_MULTIPLE) == (2, 0)
    assert 0 <= width - len(long["input_ids"]) < LENGTH_MULTIPLE
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([length, len(long["input_ids"])]))
    assert (batch["labels"][0, length:] == IGNORED).all()


def test_local_file_without_a_held_out_split(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{n}", "answer": f"a{n}"}) + "\n" for n in range(12)))
    train, test = load_conversations(str(file), None, 8, 4, seed=0)
    asked = {item.prompt[0]["content"] for item in [*train, *test]}
    assert len(train), len(test) == (8, 4)
    assert len(asked) == 12
    with pytest.raises(ValueError, match="lower --steps"):
        load_conversations(str(file), None, 9, 4, seed=0)


def test_local_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("test", 3)):
        rows = (json.dumps({"question": f"{split}{n}", "answer": "a"}) + "\n" for n in range(count))
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    train, test = load_conversations(str(tmp_path), None, 5, 3, seed=0)
    assert all(item.prompt[0]["content"].startswith("train") for item in train)
    assert all(item.prompt[0]["content"].startswith("test") for item in test)
