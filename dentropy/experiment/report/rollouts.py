"""The rollouts that contribute most, their tokens coloured by what each adds to the predicted change."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from dentropy.experiment.drawing import change_unit
from dentropy.experiment.report.numbers import Unit, number, quantity, rounded

# Shades per sign; the strongest starts at this quantile of |contribution|, or a few tokens would pale the
# rest.
SHADES = 4
FULL_COLOUR_QUANTILE = 0.97
# Longer rollouts are cut, with what was left out said in numbers.
SHOWN_TOKENS = 600
LISTED_TOKENS = 8

Token = tuple[str, float | None]  # its text and contribution; None for text that was given between generated tokens


def rollouts(content: dict, shown: list[dict]) -> dict | None:
    """The rollouts with the largest contributions, token by token; None where none are shown."""
    if not shown:
        return None
    return {
        "title": "Rollouts, token by token",
        "n_sequences": f"{content['n_sequences']:,}",
        "coloured": coloured(shown, content["step_size"], change_unit(content)),
    }


def coloured(rollouts: Sequence[dict], step_size: float, unit: Unit) -> dict:
    """All rollouts on one colour scale; contributions per unit of η are shown for the update itself."""
    tokens = [
        [(text.replace("\n", "⏎\n"), None if value is None else value * step_size) for text, value in rollout["tokens"]]
        for rollout in rollouts
    ]
    sizes = sorted(abs(value) for row in tokens for _, value in _generated(row))
    full = sizes[min(int(FULL_COLOUR_QUANTILE * len(sizes)), len(sizes) - 1)] if sizes else 0.0
    said = {"full": rounded(full, factor=unit.factor), "unit": unit.name}
    shades = [*(f"lowers-{n}" for n in range(SHADES, 0, -1)), "", *(f"raises-{n}" for n in range(1, SHADES + 1))]
    shown = [_rollout(rollout, row, full, unit, step_size) for rollout, row in zip(rollouts, tokens, strict=True)]
    return {"rollouts": shown, "shades": shades, **said}


def _generated(tokens: list[Token]) -> list[tuple[str, float]]:
    """Without what was given between them, which contributes nothing."""
    return [(text, value) for text, value in tokens if value is not None]


def _rollout(rollout: dict, tokens: list[Token], full: float, unit: Unit, step_size: float) -> dict:
    reward, rest = rollout.get("reward"), _generated(tokens[SHOWN_TOKENS:])
    return {
        "number": rollout["rollout"],
        "group": rollout["group"],
        "reward": None if reward is None else f"{reward:g}",
        "contribution": quantity(rollout["contribution"] * step_size, unit),
        "prompt": rollout["prompt"],
        "tokens": [(text, *_colour(value, full, unit)) for text, value in tokens[:SHOWN_TOKENS]],
        "n_more": f"{len(rest):,}" if rest else None,
        "more": rounded(sum(value for _, value in rest), factor=unit.factor),
        "largest": _largest(_generated(tokens), unit),
    }


def _colour(value: float | None, full: float, unit: Unit) -> tuple[str, str]:
    """A token's class and what is said of it: its number, to the digits of the strongest colour."""
    if value is None:
        return "given", "given, not generated"
    level = min(round(SHADES * abs(value) / full), SHADES) if full > 0 else 0
    shade = f"{'raises' if value > 0 else 'lowers'}-{level}" if level else ""
    return shade, f"{rounded(value, full, factor=unit.factor, digits=3)} ({unit.name})"


def _largest(tokens: list[tuple[str, float]], unit: Unit) -> list[tuple[Markup, str, Markup | None]]:
    """The numbers of the tokens that matter most, for those who see neither colours nor tooltips."""
    ranked = sorted(enumerate(tokens, start=1), key=lambda item: -abs(item[1][1]))[:LISTED_TOKENS]
    return [(number(position), text.replace("\n", ""), quantity(value, unit)) for position, (text, value) in ranked]
