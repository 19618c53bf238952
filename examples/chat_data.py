"""From a dataset of questions and answers to token ids in which only the answer carries labels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from examples.word_problems import word_problems

Messages = list[dict[str, str]]
IGNORED = -100
LENGTH_MULTIPLE = 16


@dataclass(frozen=True)
class Conversation:
    """What is asked (one or more chat messages) and what is to be answered."""

    prompt: Messages
    answer: str


def load_conversations(
    dataset: str | None, config: str | None, num_train: int, num_test: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """The first ``num_train`` and ``num_test`` conversations of a dataset (shuffled by ``seed``), held apart.

    ``dataset`` is a name on the Hub, a local folder or file, or None for the generated word problems. Without a split
    ``test`` or ``validation``, the held-out conversations are taken off the training split.
    """
    splits = word_problems(num_train, num_test, seed) if dataset is None else _load(dataset, config)
    name = dataset or "the word problems"
    if "train" not in splits:
        raise ValueError(f"{name} has no split 'train', only {sorted(splits)}")
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    train = splits["train"] if dataset is None else splits["train"].shuffle(seed=seed)
    if held_out is None:
        test, train = train.select(range(min(num_test, len(train)))), train.select(range(num_test, len(train)))
    else:
        test = splits[held_out]
    if len(train) < num_train or len(test) < num_test:
        raise ValueError(
            f"{name} has {len(train)} training and {len(test)} held-out rows; {num_train} and {num_test} are needed:"
            " lower --steps, --batch-size or --eval-problems"
        )
    return (
        [conversation(row, name) for row in train.select(range(num_train))],
        [conversation(row, name) for row in test.select(range(num_test))],
    )


def conversation(row: dict[str, Any], dataset: str) -> Conversation:
    """Reads a row with columns question/answer, prompt/completion, or messages.

    Raises ValueError naming the columns when it has none of these.
    """
    if row.get("messages"):
        *prompt, last = row["messages"]
        if not prompt or last["role"] != "assistant":
            raise ValueError(f"{dataset}: 'messages' must end in an answer by 'assistant' to something")
        return Conversation(prompt, last["content"])
    for question, answer in (("question", "answer"), ("prompt", "completion")):
        if question in row and answer in row:
            return Conversation(_messages(row[question]), _text(row[answer]))
    raise ValueError(
        f"{dataset} has the columns {sorted(row)}; needed are question and answer, prompt and completion, or messages"
    )


def tokenize(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, *, chat: bool = True
) -> list[dict[str, list[int]]]:
    """input_ids, attention_mask and labels per conversation; labels of the prompt are -100.

    With ``chat`` the tokenizer's chat template is used where it has one; otherwise the answer follows the prompt after
    an empty line, between the tokenizer's marks for beginning and end.
    """
    examples = []
    for item in conversations:
        prompt, full = _texts(item, tokenizer, chat)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(full.removeprefix(prompt), add_special_tokens=False)["input_ids"]
        ids = [*prompt_ids, *answer_ids]
        examples.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [IGNORED] * len(prompt_ids) + answer_ids,
            }
        )
    return examples


def prompts(conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase, *, chat: bool = True) -> list[str]:
    """The text that a model continues with its answer; `chat` as in `tokenize`."""
    return [_texts(item, tokenizer, chat)[0] for item in conversations]


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]]:
    """Pads a list of examples on the right, to int64 tensors (batch, longest rounded up to a multiple of 16).

    So that lengths come again: for every new one the libraries below keep some MB more of prepared matrix products.
    """
    padding = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0, "labels": IGNORED}

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        return {
            key: torch.tensor([example[key] + [fill] * (length - len(example[key])) for example in examples])
            for key, fill in padding.items()
        }

    return collate


def _texts(item: Conversation, tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[str, str]:
    if not chat or tokenizer.chat_template is None:
        paragraphs = [*(message["content"] for message in item.prompt), ""]
        prompt = str(tokenizer.bos_token or "") + "\n\n".join(paragraphs)
        return prompt, prompt + item.answer + str(tokenizer.eos_token or "")
    answered = [*item.prompt, {"role": "assistant", "content": item.answer}]
    asked_text = str(tokenizer.apply_chat_template(item.prompt, tokenize=False, add_generation_prompt=True))
    answered_text = str(tokenizer.apply_chat_template(answered, tokenize=False))
    if not answered_text.startswith(asked_text):
        raise ValueError("the chat template writes an answered prompt differently: it cannot be masked")
    return asked_text, answered_text


def _load(dataset: str, config: str | None) -> DatasetDict:
    path = Path(dataset)
    if path.is_file():
        kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
        if kind is None:
            raise ValueError(f"{dataset}: .json, .jsonl, .csv or .parquet is needed")
        loaded = load_dataset(kind, data_files={"train": dataset})
    else:
        loaded = load_dataset(dataset, config)
    if not isinstance(loaded, DatasetDict) or not all(isinstance(split, Dataset) for split in loaded.values()):
        raise ValueError(f"{dataset} does not load as a DatasetDict")
    return loaded


def _messages(value: str | Messages) -> Messages:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _text(value: str | Messages) -> str:
    return value if isinstance(value, str) else value[-1]["content"]
