"""The section on the update's own tokens: what each adds to the predicted change, as text and in sums."""

from __future__ import annotations

from collections.abc import Sequence

from dentropy.experiment.report.answer import times
from dentropy.experiment.report.numbers import rounded, unit_for
from dentropy.experiment.report.rollouts import coloured
from dentropy.experiment.report.sections import NATS, section
from dentropy.experiment.report.tables import Bar, bars
from dentropy.experiment.report.tags import Markup, tag

# Reliability below which noise is more than half of what single shares vary by.
RELIABLE = 0.5
TERMS = {
    "tokens": "The update's tokens",
    "kl": "KL penalty",
    "entropy_bonus": "Entropy bonus",
    "momentum": "Momentum of earlier steps",
    "weight_decay": "Weight decay",
    "unexplained": "Unexplained",
}
SUMS = {
    "by_advantage": ("By sign of the advantage", "Advantage"),
    "by_entropy": ("By entropy of the token's distribution (quintiles, nats)", "Entropy"),
    "by_position": ("By position in the answer", "Position"),
    "by_end": ("By end token", "Token"),
}
NOTE = (
    "What the tokens that the update was made from add to its predicted change of entropy: the gradient's term of each "
    "token, through the optimizer's step as it is taken, into the slope. With the other terms they make the whole. "
    "They are terms of one sum: an Adam's division by its second moment is held as it is, so leaving a token out would "
    "not take away just its share. There are no error bars for these."
)


def update_tokens(content: dict, shown: Sequence[dict]) -> Markup | None:
    """Which of the update's tokens the change comes from; None for a run without."""
    found, step = content.get("update_attribution"), content["step_size"]
    if found is None:
        return None
    terms = [Bar(label, times(found[name], step)) for name, label in TERMS.items() if found[name]]
    lists = [_drawn("What the slope is made of", "Term", terms)]
    for key, (title, head) in SUMS.items():
        rows = [Bar(_name(row), times(row["contribution"], step), count=row["tokens"]) for row in found[key]]
        lists.append(_drawn(title, head, rows, "Tokens"))
    return section(
        "update-tokens",
        "Why: the update's own tokens",
        tag("p", NOTE, class_="note"),
        _cosine(found),
        tag("div", lists, class_="grid"),
        tag("p", _trust(found), class_="note"),
        _text(found, shown, step),
    )


def _drawn(title: str, head: str, rows: list[Bar], count: str | None = None) -> Markup:
    unit = unit_for([row.value for row in rows], NATS)
    return bars(title, rows, unit, head=head, count=count, total_stderr=None, clear=True)


def _name(row: dict) -> str:
    if "name" in row:
        return row["name"]
    first, last = (f"{end:,}" if isinstance(end, int) else f"{end:.3g}" for end in (row["first"], row["last"]))
    return first if first == last else f"{first} to {last}"


def _cosine(found: dict) -> Markup | None:
    """Said where the update is another one than the step that was rebuilt."""
    if found["cosine"] is None or found["cosine"] > 0.9999:
        return None
    return tag(
        "p",
        f"The update is not the step rebuilt from these rollouts: the cosine of the two is {found['cosine']:.3f}. What "
        "the named terms do not explain is left unexplained, not spread over tokens.",
    )


def _trust(found: dict) -> str:
    if found["reliability"] is None:
        return "How reliable single shares are is not known: it takes two prompts. They are not coloured."
    said = (
        f"Two halves of the prompts give shares that correlate {rounded(found['correlation'])}, so those of all have a "
        f"reliability of {rounded(found['reliability'])}"
    )
    if _reliable(found):
        return f"{said} (1: no noise)."
    return f"{said}, below {RELIABLE}: single shares are mostly noise, and not coloured. Their sums say more."


def _reliable(found: dict) -> bool:
    return found["reliability"] is not None and found["reliability"] >= RELIABLE


def _text(found: dict, shown: Sequence[dict], step: float) -> Markup | None:
    if not shown or not _reliable(found):
        return None
    note = f"{len(shown)} of the update's {found['n_sequences']:,} rollouts: those that add or take away most."
    return tag("div", tag("p", note), coloured(shown, step))
