"""`base_weights` of results.json, and what it comes to in words: for the summary, the page and its warnings."""

from __future__ import annotations

from dentropy.estimators import ImportanceResult, base_weights, importance_diagnostics
from dentropy.experiment.entries import weights
from dentropy.stats.tables import SequenceSums


def entry(base: SequenceSums, prompts: str) -> dict | None:
    """The base weights of rollouts of another sampler; None where they are taken for the policy's own."""
    prefix, sequence = (base_weights(base, weights=form, prompts=prompts) for form in ("prefix", "sequence"))
    return None if prefix is None else {**_entry(prefix), "sequence": _entry(sequence)}


def _entry(found: ImportanceResult) -> dict:
    judged = importance_diagnostics(found)
    return {
        "weights": found.weights,
        "verdict": judged.verdict,
        "verdict_reason": judged.reason,
        "entropy": found.moved_value,
        "unweighted_entropy": found.base_value,
        **weights(found, judged),
        "mean_weight_stderr": judged.mean_weight_stderr,
    }


def warnings(found: dict | None) -> list[str]:
    """A sentence where the base weights are not reliable."""
    if found is None or found["verdict"] == "reliable":
        return []
    return [f"the base weights of the rollouts, of another sampler, are {found['verdict']}: {found['verdict_reason']}"]


def text(found: dict | None) -> str | None:
    """A line for a reader; None for rollouts of the policy itself.

    Example:
        >>> khat = {"w": 0.31, "wT": 0.3, "wH": 0.4}
        >>> text({"ess_fraction": 0.9, "khat": khat, "mean_weight": 1.01, "verdict": "reliable"})
        'rollouts of another sampler, reweighted: ESS 90.0%, k̂ 0.31, mean base weight 1.01, reliable'
    """
    if found is None:
        return None
    khat = found["khat"]["w"]
    said = [f"ESS {found['ess_fraction']:.1%}", *([] if khat is None else [f"k̂ {khat:.2f}"])]
    mean = "not finite" if found["mean_weight"] is None else f"{found['mean_weight']:.3g}"
    return f"rollouts of another sampler, reweighted: {', '.join(said)}, mean base weight {mean}, {found['verdict']}"
