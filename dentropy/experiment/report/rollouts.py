"""The rollouts that contribute most, their tokens coloured by what each adds to the predicted change."""

from __future__ import annotations

from collections.abc import Sequence

from dentropy.experiment.report.numbers import Unit, number, quantity, rounded, unit_for
from dentropy.experiment.report.sections import section
from dentropy.experiment.report.tags import Markup, join, tag

# Shades per sign; the strongest starts at this quantile of |contribution|, or a few tokens would pale the
# rest.
SHADES = 4
FULL_COLOUR_QUANTILE = 0.97
# Longer rollouts are cut, with what was left out said in numbers.
SHOWN_TOKENS = 600
LISTED_TOKENS = 8

Token = tuple[str, float | None]  # its text and contribution; None for text that was given between generated tokens


def rollouts(content: dict, shown: list[dict]) -> Markup | None:
    """The rollouts with the largest contributions, token by token."""
    if not shown:
        return None
    note = (
        f"{len(shown)} of {content['n_sequences']:,} rollouts: those that contribute most to the change of the update "
        "itself that the exact slope predicts. They are terms of one sample: only their sums have error bars."
    )
    return section("rollouts", "Rollouts, token by token", tag("p", note), coloured(shown, content["step_size"]))


def coloured(rollouts: Sequence[dict], step_size: float) -> Markup:
    """All rollouts on one colour scale; contributions per unit of η are shown for the update itself."""
    tokens = [
        [(text, None if value is None else value * step_size) for text, value in rollout["tokens"]]
        for rollout in rollouts
    ]
    sizes = sorted(abs(value) for row in tokens for _, value in _generated(row))
    full = sizes[min(int(FULL_COLOUR_QUANTILE * len(sizes)), len(sizes) - 1)] if sizes else 0.0
    unit = unit_for([full], "nats per token")
    shown = [_rollout(rollout, row, full, unit, step_size) for rollout, row in zip(rollouts, tokens, strict=True)]
    return join([_scale(full, unit), tag("ol", shown, class_="rollouts")])


def _scale(full: float, unit: Unit) -> Markup:
    shades = [*(f"lowers-{n}" for n in range(SHADES, 0, -1)), "", *(f"raises-{n}" for n in range(1, SHADES + 1))]
    return tag(
        "p",
        tag("span", "lowers entropy "),
        tag("span", [tag("span", class_=f"token {shade}") for shade in shades], class_="scale"),
        tag("span", " raises entropy (underlined where strong)."),
        f" Full colour from ±{rounded(full, factor=unit.factor)} ({unit.name}) on; ",
        "point at a token for its number.",
        class_="note",
    )


def _generated(tokens: list[Token]) -> list[tuple[str, float]]:
    """Without what was given between them, which contributes nothing."""
    return [(text, value) for text, value in tokens if value is not None]


def _rollout(rollout: dict, tokens: list[Token], full: float, unit: Unit, step_size: float) -> Markup:
    reward = rollout.get("reward")
    total = rollout["contribution"] * step_size
    head = tag(
        "h4",
        f"Rollout {rollout['rollout']}",
        tag("small", f"prompt {rollout['group']}"),
        None if reward is None else tag("small", f"reward {reward:g}"),
        tag("small", "contributes ", quantity(total, unit), f" ({unit.name})"),
    )
    rest = _generated(tokens[SHOWN_TOKENS:])
    more = None
    if rest:
        left_out = rounded(sum(value for _, value in rest), factor=unit.factor)
        more = tag("p", f"… and {len(rest):,} more tokens, together {left_out} ({unit.name})", class_="note")
    text = tag("p", [_token(*token, full, unit) for token in tokens[:SHOWN_TOKENS]], class_="tokens")
    return tag("li", head, tag("p", rollout["prompt"], class_="prompt"), text, more, _largest(_generated(tokens), unit))


def _token(text: str, value: float | None, full: float, unit: Unit) -> Markup:
    text = text.replace("\n", "⏎\n")
    if value is None:
        return tag("span", text, class_="token given", title="given, not generated")
    level = min(round(SHADES * abs(value) / full), SHADES) if full > 0 else 0
    shade = f" {'raises' if value > 0 else 'lowers'}-{level}" if level else ""
    said = f"{rounded(value, factor=unit.factor)} ({unit.name})"
    return tag("span", text, class_=f"token{shade}", title=said)


def _largest(tokens: list[tuple[str, float]], unit: Unit) -> Markup:
    """The numbers of the tokens that matter most, for those who see neither colours nor tooltips."""
    ranked = sorted(enumerate(tokens, start=1), key=lambda item: -abs(item[1][1]))[:LISTED_TOKENS]
    rows = [
        tag(
            "tr",
            tag("td", number(position)),
            tag("td", tag("code", text.replace("\n", "⏎"))),
            tag("td", quantity(value, unit)),
        )
        for position, (text, value) in ranked
    ]
    heads = [tag("th", head, scope="col") for head in ("position", "token", unit.name)]
    listed = tag("table", tag("thead", tag("tr", heads)), tag("tbody", rows), class_="largest")
    return tag("details", tag("summary", "Largest tokens in numbers"), listed)
