"""The page of a replayed run: what its steps add up to, the figure, and a table that leads to each step's report."""

from __future__ import annotations

import base64

from markupsafe import Markup

from dentropy.experiment.drawing import NATS
from dentropy.experiment.readings import told_apart
from dentropy.experiment.report.numbers import Unit, number, percent, plain, quantity, unit_for, with_error
from dentropy.experiment.report.page import POLICY, rendered
from dentropy.experiment.report.tables import Column, Table, table
from dentropy.experiment.timeline_figure import change_unit

UPDATE = ("tokens", "momentum", "weight decay", "unexplained")


def html(content: dict, picture: bytes) -> str:
    """The page, self-contained: no scripts, no requests.

    Args:
        content: That of replay.json.
        picture: The figure, a PNG.

    Returns:
        The page. Links lead to the reports of the steps beside it.
    """
    steps = content["steps"]
    return rendered(
        "replay.html",
        answer=answer(content),
        run=content["run"],
        notes=content["notes"],
        warned=[(*_checkpoints(row), row["warnings"]) for row in steps if row["warnings"]],
        picture="data:image/png;base64," + base64.b64encode(picture).decode("ascii"),
        sums=_sums(content["totals"]),
        steps=_steps(steps),
        policy=f"{POLICY}; img-src data:",  # the figure that the page brings along
    )


def answer(content: dict) -> str:
    """One sentence: the sum of what was measured."""
    found = content["totals"]
    value, stderr = found["measured"], found["measured_stderr"]
    steps = f"Over {found['steps']} steps between checkpoints"
    if value is None:
        return f"{steps} the change of entropy is not known: a measurement is not finite."
    if stderr is not None and not told_apart(value, stderr):
        return (
            f"{steps} entropy does not change by an amount that can be told from zero: {plain(value, stderr)} {NATS}."
        )
    return f"{steps} entropy {'falls' if value < 0 else 'rises'} by {plain(abs(value), stderr)} {NATS} (measured)."


def _sums(found: dict) -> Table:
    names = {
        "measured": "Sum of the measured changes",
        "predicted": "Sum of the predicted changes, by slopes",
        "predicted_quadratic": "The same with curvatures",
        "whole": "Last less first checkpoint, each by rollouts of its own",
        "difference": "Sum of the measured changes less that",
        "measured_until": f"Sum of the measured changes until checkpoint {found['logged_until']}",
        "logged": "The same as the trainer logged it",
    }
    rows = [{"name": said, "value": found[name], "stderr": found.get(f"{name}_stderr")} for name, said in names.items()]
    rows = [row for row in rows if row["value"] is not None]
    unit = unit_for([row["value"] for row in rows], NATS)
    columns = [("", "", lambda row: row["name"]), ("ΔH ± SE", unit.name, lambda row: _sum(row, unit))]
    return table("Changes of the entropy over the whole run", rows, columns)


def _sum(row: dict, unit: Unit) -> Markup:
    """What the trainer logged has no error."""
    if row["stderr"] is None:
        return quantity(row["value"], unit)
    return with_error(row["value"], row["stderr"], unit)


def _steps(rows: list[dict]) -> list[Table]:
    change = change_unit(rows)
    entropy, no_unit, tokens, nats = (Unit(1.0, name) for name in (NATS, "", "tokens", "nats per rollout"))
    checkpoints = ("Checkpoints", "before, after", _link)
    changes = [
        checkpoints,
        ("Judged by", "", _judge),
        ("Rollouts", "", lambda row: row.get("n_rollouts") and number(row["n_rollouts"])),
        _with_error("Entropy after", "entropy_after", entropy),
        ("Logged", NATS, _logged),
        _with_error("ΔH predicted", "predicted", change),
        _with_error("with curvature", "predicted_quadratic", change),
        _with_error("ΔH measured", "measured", change),
        _with_error("predicted − measured", "error", change),
        ("ESS", "", lambda row: percent(row.get("ess_fraction"))),
        ("Verdict", "", lambda row: row["verdict"]),
    ]
    forecast = [
        checkpoints,
        _with_error("Reward predicted", "reward_predicted", no_unit),
        _with_error("measured", "reward_measured", no_unit),
        _with_error("Length predicted", "length_predicted", tokens),
        _with_error("measured", "length_measured", tokens),
        _with_error("KL divergence", "kl", nats),
    ]
    sources = [
        checkpoints,
        _with_error("ΔH predicted", "predicted", change),
        _with_error("in the same contexts", "pathwise", change),
        _with_error("through other answers", "other_answers", change),
        _alone("without the length correction", "predicted_uncorrected", change),
        *[_alone(f"update: {name}", f"update_{name}".replace(" ", "_"), change) for name in UPDATE],
        _alone("cosine", "update_cosine", no_unit),
    ]
    return [
        table("Change of the entropy; each step leads to its own report", rows, changes),
        table("Reward, length and divergence of each step", rows, forecast),
        table("Where the predicted change comes from", rows, sources),
    ]


def _with_error(head: str, name: str, unit: Unit) -> Column:
    return head, unit.name, lambda row: with_error(row.get(name), row.get(f"{name}_stderr"), unit)


def _alone(head: str, name: str, unit: Unit) -> Column:
    return head, unit.name, lambda row: quantity(row.get(name), unit)


def _logged(row: dict) -> Markup | None:
    value = row["logged_entropy_after"]
    return None if value is None else number(value, f"{value:.4f}")


def _judge(row: dict) -> Markup | str:
    """With the ESS of the weights that make rollouts of another sampler count as the checkpoint's."""
    share = row.get("base_weights_ess_fraction")
    if share is None:
        return row["judged_by"]
    return Markup("{}<br><small>reweighted, ESS {}</small>").format(row["judged_by"], percent(share))


def _link(row: dict) -> Markup | str:
    text, href = _checkpoints(row)
    return text if href is None else Markup('<a href="{}">{}</a>').format(href, text)


def _checkpoints(row: dict) -> tuple[str, str | None]:
    """The two, and where their report is; equal checkpoints have none."""
    before, after = row["step_before"], row["step_after"]
    href = f"pairs/{before:06d}-{after:06d}/probe/report.html" if "n_rollouts" in row else None
    return f"{before} → {after}", href
