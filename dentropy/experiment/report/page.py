"""The page put together from its sections."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from dentropy.experiment.report.answer import answer, comparison, ways
from dentropy.experiment.report.attribution import attribution
from dentropy.experiment.report.changes import changes, reliability
from dentropy.experiment.report.forecast import forecast
from dentropy.experiment.report.provenance import audit, provenance
from dentropy.experiment.report.proxies import proxies
from dentropy.experiment.report.rollouts import rollouts as token_by_token
from dentropy.experiment.report.slopes import slopes
from dentropy.experiment.report.tags import Markup, tag
from dentropy.experiment.report.update_tokens import update_tokens
from dentropy.experiment.summary import warnings
from dentropy.experiment.trade import trade

# The browser itself refuses whatever the page does not bring along.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html(content: dict, rollouts: list[dict], update_rollouts: Sequence[dict] = ()) -> str:
    """The report as a self-contained HTML page: no scripts, no requests, light and dark.

    Args:
        content: That of results.json; what is None or absent there is left out of the page.
        rollouts: Those to show token by token, as `rollout_rows.largest` gives them: rollout, group, reward
            (or None), prompt, contribution and tokens, a list of [text, contribution]; contributions in nats per
            token per unit of η. All text is escaped.
        update_rollouts: Those of the update, as `update_tokens.largest` gives them, in the same form.

    Returns:
        The page.
    """
    shown = [
        section
        for section in (
            forecast(content),
            changes(content),
            reliability(content),
            slopes(content),
            attribution(content),
            update_tokens(content, update_rollouts),
            proxies(content),
            token_by_token(content, rollouts),
            audit(content),
            provenance(content),
        )
        if section is not None
    ]
    body = tag("body", _head(content), tag("main", shown))
    return f"<!doctype html>\n{tag('html', _metadata(content), body, lang='en')}\n"


def _metadata(content: dict) -> Markup:
    style = Markup(files(__package__).joinpath("report.css").read_text(encoding="utf-8"))
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", "dentropy: ", answer(content)),
        tag("style", style),
    )


def _head(content: dict) -> Markup:
    explained, warned = ways(content), len(warnings(content))
    link, bought = None, trade(content)
    if warned:
        text = f"{warned} warning{'s' if warned > 1 else ''}: read before use"
        link = tag("p", tag("a", text, href="#audit"), class_="warned")
    return tag(
        "header",
        tag("p", "dentropy report", class_="label"),
        tag("h1", answer(content)),
        None if bought is None else tag("p", bought, class_="trade"),
        link,
        tag("dl", comparison(content), class_="comparison"),
        None if explained is None else tag("p", explained),
        tag("p", "± is one standard error.", class_="note"),
    )
