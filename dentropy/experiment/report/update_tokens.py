"""The section on the update's own tokens: what each adds to the predicted change, as text and in sums."""

from __future__ import annotations

from collections.abc import Sequence

from dentropy.experiment.report.answer import times
from dentropy.experiment.report.numbers import rounded, unit_for
from dentropy.experiment.report.rollouts import coloured
from dentropy.experiment.report.sections import NATS, section
from dentropy.experiment.report.tables import Bar, bars
from dentropy.experiment.report.tags import Markup, tag

# The most noise in coloured shares: as the estimate can be half of what is true, at most half of them then is.
QUIET = 0.25
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
GROUPS = (
    "Groups of tokens with error bars, for other rollouts of the evaluation and this very update. What the rest makes "
    "is what the update would be predicted to do without the group, an Adam's division held as it is."
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
        *_groups(content.get("update_groups"), step),
        tag("p", _trust(found), class_="note"),
        _text(found, shown, step),
    )


def _groups(found: list[dict] | None, step: float) -> list[Markup]:
    """The groups, and what the update does without each."""
    if not found:
        return []
    parts = {"share": "What groups of tokens make", "rest": "The rest of the update without them"}
    drawn = []
    for part, title in parts.items():
        rows = [
            Bar(row["name"], *(times(row[part][key], step) for key in ("value", "stderr")), row["tokens"])
            for row in found
        ]
        unit = unit_for([row.value for row in rows], NATS)
        drawn.append(bars(title, rows, unit, head="Group", count="Tokens", total_stderr=None, clear=True, total=False))
    return [tag("p", GROUPS, class_="note"), tag("div", drawn, class_="grid")]


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
    noise = found["noise_fraction"]
    if noise is None:
        return "How much of single shares is noise is not known: it takes two prompts. They are not coloured."
    said = (
        f"Of the squares of single shares a part of {rounded(noise)} is noise of the rollouts, estimated from four "
        "parts of the prompts; it can be wrong by a factor of two"
    )
    if _reliable(found):
        return f"{said}. At most {QUIET} of it is asked for to colour tokens."
    if noise < 1:
        return f"{said}. Above {QUIET} tokens are not coloured. Sums of shares say more."
    return f"{said}. The parts disagree: single shares are all noise, and not coloured. Sums of shares say more."


def _reliable(found: dict) -> bool:
    return found["noise_fraction"] is not None and found["noise_fraction"] <= QUIET


def _text(found: dict, shown: Sequence[dict], step: float) -> Markup | None:
    if not shown or not _reliable(found):
        return None
    note = f"{len(shown)} of the update's {found['n_sequences']:,} rollouts: those that add or take away most."
    return tag("div", tag("p", note), coloured(shown, step))
