"""The generated word problems: their arithmetic holds, they vary, and the splits are disjoint."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.word_problem_templates import TEMPLATES, Template
from examples.word_problems import problems, word_problems

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def check_worked_answer(answer: str) -> None:
    """Every written step is true, and the last one's result is the final answer."""
    *lines, final = answer.split("\n")
    assert 2 <= len(lines) <= 5
    result = None
    for line in lines:
        ((left, operator, right, result),) = STEP.findall(line)
        a, b, c = int(left), int(right), int(result)
        if operator == "/":
            assert b * c == a, line
        else:
            assert {"+": a + b, "-": a - b, "*": a * b}[operator] == c, line
        assert c > 0
    assert final == f"#### {result}"


@settings(max_examples=25, deadline=None)
@given(st.integers(min_value=0, max_value=2**32))
def test_each_step_of_an_answer_is_true(seed: int) -> None:
    for problem in itertools.islice(problems(seed), 20):
        check_worked_answer(problem["answer"])
        assert not re.search(r"[{}\[\]]", problem["question"] + problem["answer"]), "a hole was left unfilled"


def test_the_check_sees_a_wrong_step() -> None:
    with pytest.raises(AssertionError):
        check_worked_answer("There are 2 * 3 = 7 pears.\nLeft are 7 - 1 = 6 pears.\n#### 6")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_steps_start_from_numbers_of_the_story(template: Template) -> None:
    for problem in itertools.islice((p for p in problems(1) if p["template"] == template.name), 5):
        known = set(re.findall(r"\d+", problem["question"])) | {"2"}  # "half" and "twice" are not written as a number
        for left, _, right, result in STEP.findall(problem["answer"]):
            assert {left, right} <= known, problem
            known.add(result)


def test_every_template_comes_up_and_some_problems_have_distractors() -> None:
    found = list(itertools.islice(problems(0), 600))
    assert {problem["template"] for problem in found} == {template.name for template in TEMPLATES}
    assert len(TEMPLATES) >= 20
    distracted = sum("dog that turned" in problem["question"] for problem in found)
    assert distracted > 20


def test_splits_are_disjoint_and_seeded() -> None:
    splits = word_problems(200, 40, seed=3)
    assert splits["train"].num_rows == 200
    assert splits["test"].num_rows == 40
    assert {"question", "answer"} <= set(splits["train"].column_names)
    assert not set(splits["train"]["question"]) & set(splits["test"]["question"])
    assert word_problems(200, 40, seed=3)["train"]["question"] == splits["train"]["question"]
    assert word_problems(10, 40, seed=3)["test"]["question"] == splits["test"]["question"]
    assert word_problems(10, 40, seed=4)["test"]["question"] != splits["test"]["question"]
