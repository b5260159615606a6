"""The page put together from its sections: what they say is made here and in their modules, HTML by the templates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dentropy.experiment.drawing import svg
from dentropy.experiment.report.answer import answer, comparison, ways
from dentropy.experiment.report.attribution import attribution
from dentropy.experiment.report.changes import changes, reliability
from dentropy.experiment.report.forecast import forecast
from dentropy.experiment.report.provenance import audit, provenance
from dentropy.experiment.report.proxies import proxies
from dentropy.experiment.report.rollouts import rollouts as token_by_token
from dentropy.experiment.report.slopes import slopes
from dentropy.experiment.report.update_groups import update_groups
from dentropy.experiment.report.update_tokens import update_tokens
from dentropy.experiment.trade import trade
from dentropy.experiment.warned import of_the_answer, warned

# The browser itself refuses whatever the page does not bring along.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# What HTML cannot hold as text: control characters, and lone surrogates as in undecodable file names.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
PACKAGE = "dentropy.experiment.report"
TEMPLATES = Environment(
    loader=PackageLoader(PACKAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def html(
    content: dict, rollouts: list[dict], update_rollouts: Sequence[dict] = (), pictures: Mapping[str, object] = {}
) -> str:
    """The report as a self-contained HTML page: no scripts, no requests, light and dark.

    Args:
        content: That of results.json; what is None or absent there is left out of the page.
        rollouts: Those to show token by token, as `rollout_rows.largest` gives them: rollout, group, reward
            (or None), prompt, contribution and tokens, a list of [text, contribution]; contributions in nats per
            token per unit of η. All text is escaped.
        update_rollouts: Those of the update, as `update_tokens.largest` gives them, in the same form.
        pictures: Figures by the names of `figures.FIGURES`; those that are missing are left out.

    Returns:
        The page.
    """
    sections = {
        "forecast": forecast(content),
        "changes": changes(content),
        "reliability": reliability(content),
        "slope": slopes(content),
        "attribution": attribution(content),
        "update-tokens": update_tokens(content, update_rollouts),
        "update-groups": update_groups(content),
        "proxies": proxies(content),
        "rollouts": token_by_token(content, rollouts),
        "audit": audit(content),
        "provenance": provenance(content),
    }
    return rendered(
        "page.html",
        answer=answer(content),
        trade=trade(content),
        comparison=comparison(content),
        ways=ways(content),
        doubts=of_the_answer(content),
        n_warnings=len(warned(content)),
        sections={name: section for name, section in sections.items() if section is not None},
        pictures={name.partition(".")[0]: Markup(svg(figure, name)) for name, figure in pictures.items()},
        policy=POLICY,
    )


def rendered(template: str, **values: object) -> str:
    """A page of a template with these values and the report's style."""
    style = Markup(files(PACKAGE).joinpath("report.css").read_text(encoding="utf-8"))
    text = TEMPLATES.get_template(template).render(style=style, **values)
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
