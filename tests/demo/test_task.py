import ast
import operator
import random

import pytest

from dentropy.demo import task

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def parsed_value(text):
    """The value by Python's own parser, or None where the text is not in the task's grammar."""
    if len(text) > task.MAX_ANSWER or set(text) - set("0123456789+-*"):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    # Python reads "00" as 0; unparse writes it "0", which gives leading zeros away.
    if ast.unparse(tree).replace(" ", "") != text:
        return None
    return tree_value(tree)


def tree_value(node):
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = tree_value(node.left), tree_value(node.right)
        return None if left is None or right is None else OPERATORS[type(node.op)](left, right)
    return None


def mutated(text, rng):
    """The text with one character inserted, replaced, deleted or doubled."""
    at = rng.randrange(len(text))
    character = rng.choice(task.CHARACTERS + "0+-* ()_ex.\n²٣")
    return rng.choice(
        [
            text[:at] + character + text[at:],
            text[:at] + character + text[at + 1 :],
            text[:at] + text[at + 1 :],
            text[:at] + text[at] + text[at:],
        ]
    )


def test_generated_expressions_have_the_target_value_and_lengths_vary():
    rng = random.Random(0)
    lengths = set()
    for _ in range(5000):
        target = rng.randint(0, task.MAX_TARGET)
        expression = task.random_expression(target, rng)
        assert parsed_value(expression) == target
        assert task.reward(f"{target}=", expression) == 1.0
        assert set(expression) <= set(task.CHARACTERS)
        lengths.add(len(expression))
    assert min(lengths) == 1 and 15 <= max(lengths) < task.MAX_ANSWER and len(lengths) >= 15


def test_value_and_reward_agree_with_pythons_parser_on_mutated_expressions():
    rng = random.Random(1)
    outcomes = {"malformed": 0, "right": 0, "wrong": 0}
    for _ in range(20000):
        target = rng.randint(0, task.MAX_TARGET)
        text = task.random_expression(target, rng)
        for _ in range(rng.randint(1, 3)):
            text = mutated(text, rng) if text else "+"
        expected = parsed_value(text)
        assert task.value(text) == expected, text
        assert task.reward(f"{target}=", text) == float(expected == target), text
        outcomes["malformed" if expected is None else "right" if expected == target else "wrong"] += 1
    assert min(outcomes.values()) > 200, outcomes


def test_value_agrees_with_pythons_parser_on_random_strings():
    rng = random.Random(2)
    texts = ["".join(rng.choices("0123456789+-*", k=rng.randint(0, 9))) for _ in range(20000)]
    expected = [parsed_value(text) for text in texts]
    assert [task.value(text) for text in texts] == expected
    assert sum(value is not None for value in expected) > 1000


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "+7",
        "-7",
        "7+",
        "07",
        "00",
        "7+00",
        "3+04",
        "3++4",
        "3--4",
        "3*+4",
        "7**1",
        "14/2",
        "(7)",
        "3 + 4",
        " 7",
        "7\n",
        "7=",
        "7=7",
        "7.0",
        "0x7",
        "7e0",
        "٧",
        "7<eos>",
        "1*" * 16 + "7",
        "9" * 5000,
    ],
)
def test_malformed_answers_get_nothing(answer):
    assert task.value(answer) is None
    assert task.reward("7=", answer) == 0.0


def test_longest_allowed_answer():
    answer = "1*" * ((task.MAX_ANSWER - 2) // 2) + "17"
    assert len(answer) == task.MAX_ANSWER and task.reward("17=", answer) == 1.0


@pytest.mark.parametrize("prompt", ["", "17", "=", "017=", "-3=", "17==", "17=9", "x=", "17=\n"])
def test_malformed_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="prompt"):
        task.reward(prompt, "17")


def test_prompts_are_reproducible_and_cover_the_range():
    drawn = task.prompts(2000, seed=3)
    assert drawn == task.prompts(2000, seed=3) and drawn != task.prompts(2000, seed=4)
    assert {int(prompt.removesuffix("=")) for prompt in drawn} == set(range(task.MAX_TARGET + 1))


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="target"):
        task.random_expression(-1, random.Random(0))
    with pytest.raises(ValueError, match="target"):
        task.random_expression(task.MAX_TARGET + 1, random.Random(0))
    with pytest.raises(ValueError, match="n: "):
        task.prompts(-1, seed=0)
    assert task.prompts(0, seed=0) == []
