"""The section on the update's own tokens: what each adds to the predicted change, as text and in sums."""

from __future__ import annotations

from collections.abc import Sequence

from dentropy.experiment.bars import Bar
from dentropy.experiment.drawing import change_unit
from dentropy.experiment.report.answer import times
from dentropy.experiment.report.numbers import rounded
from dentropy.experiment.report.rollouts import coloured
from dentropy.experiment.report.tables import terms

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


def update_tokens(content: dict, shown: Sequence[dict]) -> dict | None:
    """Which of the update's tokens the change comes from; None for a run without."""
    found, step, unit = content.get("update_attribution"), content["step_size"], change_unit(content)
    if found is None:
        return None
    rows = [Bar(label, times(found[name], step)) for name, label in TERMS.items() if found[name]]
    lists = [terms("What the update is made of", rows, unit, head="Term")]
    for key, (title, head) in SUMS.items():
        rows = [Bar(_name(row), times(row["contribution"], step), count=row["tokens"]) for row in found[key]]
        lists.append(terms(title, rows, unit, head=head, count="Tokens"))
    cosine = found["cosine"]
    return {
        "title": "Why: the update's own tokens",
        "cosine": None if cosine is None or cosine > 0.9999 else f"{cosine:.3f}",
        "lists": [each for each in lists if each is not None],
        "trust": _trust(found),
        "n_sequences": f"{found['n_sequences']:,}",
        "coloured": coloured(shown, step, unit) if shown and _reliable(found) else None,
    }


def _name(row: dict) -> str:
    if "name" in row:
        return row["name"]
    first, last = (f"{end:,}" if isinstance(end, int) else f"{end:.3g}" for end in (row["first"], row["last"]))
    return first if first == last else f"{first} to {last}"


def _trust(found: dict) -> str:
    noise = found["noise_fraction"]
    if noise is None:
        return "How much of single shares is noise is not known: it takes two prompts. They are not coloured."
    how = "estimated from four parts of the prompts, which can be wrong by a factor of two"
    if noise >= 1:
        return (
            f"The squares of single shares may be all noise of the rollouts ({rounded(noise)} of them, {how}), so that "
            "tokens are not coloured. Sums of shares say more."
        )
    said = f"Of the squares of single shares a part of {rounded(noise)} is noise of the rollouts ({how})."
    if _reliable(found):
        return f"{said} At most {QUIET} of it is asked for to colour tokens."
    return f"{said} Above {QUIET} tokens are not coloured. Sums of shares say more."


def _reliable(found: dict) -> bool:
    return found["noise_fraction"] is not None and found["noise_fraction"] <= QUIET
