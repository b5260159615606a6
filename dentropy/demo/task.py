"""The demo's task: write an arithmetic expression that equals a given number.

A prompt is a number and an equals sign, "17="; an answer is any expression of digits, "+", "-" and "*" with
this value: "9+8", "20-3", "2*8+1". The reward is checkable, the answers differ in length, and a longer answer
has more places to go wrong: an update that raises the reward changes the length too.
"""

from __future__ import annotations

import math
import random
import re

CHARACTERS = "0123456789+-*="
MAX_TARGET = 30
MAX_TERM = 12
MAX_TERMS = 5
MAX_ANSWER = 32  # characters; a longer answer is worth nothing

_NUMBER = "(?:0|[1-9][0-9]*)"
_PROMPT = re.compile(f"({_NUMBER})=")
_EXPRESSION = re.compile(f"{_NUMBER}(?:[-+*]{_NUMBER})*")
_SIGNED_TERM = re.compile("([-+]?)([0-9*]+)")


def prompts(n: int, seed: int) -> list[str]:
    """Draw `n` prompts, their numbers uniform on 0..MAX_TARGET; the same seed gives the same list.

    Raises:
        ValueError: Where `n` is negative.

    Example:
        >>> prompts(3, seed=0)
        ['27=', '12=', '24=']
    """
    if n < 0:
        raise ValueError(f"n: {n}, expected 0 or more")
    rng = random.Random(seed)
    return [f"{rng.randint(0, MAX_TARGET)}=" for _ in range(n)]


def reward(prompt: str, answer: str) -> float:
    """1.0 if `answer` is an expression that equals the prompt's number, else 0.0.

    Args:
        prompt: A number and an equals sign.
        answer: The text without the end token.

    Raises:
        ValueError: Where `prompt` is something else.

    Example:
        >>> reward("17=", "2*8+1"), reward("17=", "2*8"), reward("17=", "017")
        (1.0, 0.0, 0.0)
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt: {prompt!r}, expected a number and '=', such as '17='")
    return float(value(answer) == int(match[1]))


def value(expression: str) -> int | None:
    """The value of an expression, or None where the grammar does not allow it.

    expression = term {("+" | "-") term}, term = number {"*" number}, number = "0" | a digit 1-9 {digit}:
    no signs in front, no leading zeros, no brackets, no spaces, at most MAX_ANSWER characters.

    Example:
        >>> value("20-3*4"), value("-3"), value("3--3"), value("")
        (8, None, None, None)
    """
    if len(expression) > MAX_ANSWER or _EXPRESSION.fullmatch(expression) is None:
        return None
    total = 0
    for sign, term in _SIGNED_TERM.findall(expression):
        product = math.prod(int(factor) for factor in term.split("*"))
        total += -product if sign == "-" else product
    return total


def random_expression(target: int, rng: random.Random) -> str:
    """A random expression of 1 to MAX_TERMS terms that equals `target`; the policy learns to imitate these.

    All terms but the last are random in 1..MAX_TERM, with signs that keep the running total within
    0..MAX_TARGET; the last one closes the gap. So all but the end of an answer is a free choice, and its end
    is arithmetic.

    Raises:
        ValueError: Where `target` is outside 0..MAX_TARGET.

    Example:
        >>> random_expression(17, random.Random(1))
        '5*2+7'
    """
    if not 0 <= target <= MAX_TARGET:
        raise ValueError(f"target: {target!r}, expected a number in 0..{MAX_TARGET}")
    n_terms = rng.randint(1, MAX_TERMS)
    total, text = 0, ""
    for _ in range(n_terms - 1):
        term = rng.randint(1, MAX_TERM)
        signs = [sign for sign in (1, -1) if 0 <= total + sign * term <= MAX_TARGET]
        sign = rng.choice(signs)
        total += sign * term
        text += _signed(sign * term, text, rng)
    if total == target and text:
        return text
    return text + _signed(target - total, text, rng)


def _signed(term: int, before: str, rng: random.Random) -> str:
    sign = "-" if term < 0 else "+" if before else ""
    return sign + _written(abs(term), rng)


def _written(number: int, rng: random.Random) -> str:
    """The number itself or, half of the time where there is one, a product of two digits."""
    products = [f"{a}*{number // a}" for a in range(2, 10) if number % a == 0 and 2 <= number // a <= 9]
    if products and rng.random() < 0.5:
        return rng.choice(products)
    return str(number)
