"""Grade-school word problems with a worked answer, made from templates and a seed.

Numbers are drawn again until every step is a positive whole number, so an answer is always exact. The answer ends in
``#### 42``, as in GSM8K. Sentences that do not matter to the question are mixed into the story.
"""

import re
from collections.abc import Iterator
from random import Random

from datasets import Dataset, DatasetDict

from examples.word_problem_templates import CONSTANTS, DISTRACTORS, TEMPLATES, WORDS, Template

_HOLE = re.compile(r"\{(\w+)(?::(\d+)-(\d+)(?::(\d+))?)?\}")
_STEP = re.compile(r"\[(\w+) = (\w+) ([-+*/]) (\w+)\]")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_MAX_NUMBER = 5000


class _Impossible(Exception):
    """The drawn numbers make a step that is not a positive whole number."""


class _Draw:
    """The words and numbers of one problem."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.numbers = dict(CONSTANTS)
        self.words: dict[str, str] = {}

    def fill(self, text: str) -> str:
        return _HOLE.sub(self._hole, text)

    def work(self, line: str) -> str:
        return self.fill(_STEP.sub(self._step, line))

    def _hole(self, hole: re.Match[str]) -> str:
        key, low, high, stride = hole.groups()
        if low is not None:
            self.numbers[key] = self.rng.randrange(int(low), int(high) + 1, int(stride or 1))
        if key in self.numbers:
            return str(self.numbers[key])
        if key not in self.words:
            choices = WORDS["name" if key == "other" else key]
            self.words[key] = self.rng.choice([word for word in choices if word not in self.words.values()])
        return self.words[key]

    def _step(self, step: re.Match[str]) -> str:
        target, left, operator, right = step.groups()
        a, b = self.numbers[left], self.numbers[right]
        if operator == "/" and a % b:
            raise _Impossible
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
        if not 0 < value <= _MAX_NUMBER:
            raise _Impossible
        self.numbers[target] = value
        return f"{a} {operator} {b} = {value}"


def _problem(template: Template, rng: Random) -> dict[str, str]:
    while True:
        draw = _Draw(rng)
        sentences = _SENTENCE.split(draw.fill(template.story))
        question = draw.fill(template.question)
        try:
            lines = [draw.work(line) for line in template.answer]
        except _Impossible:
            continue
        result = list(draw.numbers.values())[-1]
        for distractor in rng.sample(DISTRACTORS, rng.choice((0, 1, 1, 2))):
            sentences.insert(rng.randint(1, len(sentences)), draw.fill(distractor))
        return {
            "question": " ".join([*sentences, question]),
            "answer": "\n".join([*lines, f"#### {result}"]),
            "template": template.name,
        }


def problems(seed: int = 0) -> Iterator[dict[str, str]]:
    """Endless stream of different problems (no question comes twice): question, answer and the template's name."""
    rng = Random(seed)
    seen: set[str] = set()
    while True:
        problem = _problem(rng.choice(TEMPLATES), rng)
        if problem["question"] not in seen:
            seen.add(problem["question"])
            yield problem


def word_problems(num_train: int, num_test: int, seed: int = 0) -> DatasetDict:
    """Splits ``train`` and ``test`` with columns question, answer and template; no question is in both.

    The test problems come first in the stream, so that they do not depend on ``num_train``.
    """
    stream = problems(seed)
    test = [next(stream) for _ in range(num_test)]
    train = [next(stream) for _ in range(num_train)]
    return DatasetDict({"train": Dataset.from_list(train), "test": Dataset.from_list(test)})
