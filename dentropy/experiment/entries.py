"""The entries of results.json, each from the estimate it is about; `dentropy/results.md` describes them."""

from __future__ import annotations

import math
import platform
from importlib.metadata import PackageNotFoundError, version

from dentropy.estimators import (
    Bins,
    Estimate,
    ImportanceDiagnostics,
    ImportanceResult,
    Statistic,
    TrustRange,
    by_lag,
    by_length,
    by_position,
    difference,
)
from dentropy.estimators.slopes import slope as slope_of
from dentropy.experiment.changes import Change, Form
from dentropy.passes.parameter_attribution import by_kind, by_layer
from dentropy.stats.tables import SequenceSums

# The later tokens that `horizon` keeps: what a token leads to further on is mostly noise.
HORIZON = 16


def slope(estimate: Estimate) -> dict:
    """An entry of `slope`."""
    return {
        "estimator": estimate.estimator,
        "value": estimate.value,
        **errors(estimate),
        **estimate.parts,
        "part_stderrs": dict(estimate.part_stderrs),
    }


def horizon(base: SequenceSums, prompts: str) -> dict | None:
    """`horizon`; None where nothing lies beyond it."""
    if base.n_tokens.max() <= HORIZON + 1:
        return None
    estimate = slope_of(base, prompts=prompts, horizon=HORIZON)
    return {
        "tokens": HORIZON,
        "value": estimate.value,
        **errors(estimate),
        "left_out": estimate.parts["left_out"],
        "left_out_stderr": estimate.part_stderrs["left_out"],
    }


def curvature(causal: Estimate, exact: Estimate, base: SequenceSums) -> dict:
    """`curvature`, with the step of the differences that the base table's second derivatives came from."""
    step = base.second_order_step
    return {
        **_curvature(causal),
        "step": None if step is None else float(step[0]),
        "exact": {**_curvature(exact), **_difference(causal, exact)},
    }


def _curvature(estimate: Estimate) -> dict:
    parts = {**estimate.parts, "part_stderrs": dict(estimate.part_stderrs)}
    return {"estimator": estimate.estimator, "value": estimate.value, **errors(estimate), **parts}


def _difference(first: Statistic, second: Statistic) -> dict:
    """What lies between two forms of one number, `difference` and its error."""
    found = difference(first, second)
    return {"difference": found.value, "difference_stderr": found.stderr}


def trust(found: TrustRange) -> dict:
    """`trust`."""
    return {"eta_star": found.eta_star, **errors(found), "linear_until": found.linear_limit}


def measured(change: Change, causal: Estimate) -> dict:
    """An entry of `measured`; the causal slope knows the uncorrected prediction too."""
    return {
        "eta": change.eta,
        **_form(change),
        "predicted_uncorrected": change.eta * causal.parts["uncorrected"],
        "worst_position": change.measured.worst_position,
        "worst_ess_fraction": change.measured.worst_ess_fraction,
        "sequence": {**_form(change.sequence), **_difference(change.measured, change.sequence.measured)},
    }


def _form(form: Form) -> dict:
    result, found, quadratic = form.measured, form.diagnostics, form.quadratic
    return {
        "weights": result.weights,
        "delta": result.delta,
        **errors(result),
        "noise_floor": form.noise_floor,
        "below_noise_floor": form.below_noise,
        "smoothed_delta": found.smoothed_delta,
        "verdict": found.verdict,
        "verdict_reason": found.reason,
        "moved_entropy": result.moved_value,
        "predicted_linear": form.linear.value,
        "predicted_linear_stderr": form.linear.stderr,
        "predicted_quadratic": None if quadratic is None else quadratic.value,
        "predicted_quadratic_stderr": None if quadratic is None else quadratic.stderr,
        "prediction_error": form.error.value,
        "prediction_error_stderr": form.error.stderr,
        **weights(result, found),
    }


def weights(result: ImportanceResult, found: ImportanceDiagnostics) -> dict:
    """What the entry of a measurement says of its weights."""
    return {
        "ess": result.ess,
        "ess_fraction": result.ess_fraction,
        "ess_tokens": result.ess_tokens,
        "khat": {"w": found.khat, "wT": found.khat_tokens, "wH": found.khat_entropy},
        "khat_reason": found.khat_reason,
        "khat_threshold": found.khat_threshold,
        "max_weight": result.max_weight,
        "mean_weight": result.mean_weight,
        "log_weight_quantiles": dict(result.log_weight_quantiles),
    }


def attribution(base: SequenceSums, prompts: str, parameters: dict[str, float] | None) -> dict:
    """`attribution`: where the slope comes from; every list sums to the causal one, by_length to the exact one."""
    entry = {
        "by_position": _bins(by_position(base, prompts=prompts), "tokens"),
        "by_length": _bins(by_length(base, prompts=prompts), "rollouts"),
        "by_lag": _bins(by_lag(base, prompts=prompts), "pairs"),
        "by_layer": None,
        "by_kind": None,
        "parameters": None,
    }
    if parameters is not None:
        for name, shares in (
            ("by_layer", by_layer(parameters)),
            ("by_kind", by_kind(parameters)),
            ("parameters", parameters),
        ):
            entry[name] = [{"name": part, "contribution": share} for part, share in shares.items()]
    return entry


def versions() -> dict[str, str | None]:
    """`versions`."""
    from dentropy import __version__

    found = {"dentropy": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "transformers", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def writable(content: dict) -> dict:
    """The content as JSON and UTF-8 can hold it.

    Numbers that are not finite become None, and `not_finite` says which they were, by path. Bytes of a file name
    that are no UTF-8 (lone surrogates to Python) are written by their code.

    Example:
        >>> writable({"delta": [1.0, float("inf")], "name": "a\\udcff"})
        {'delta': [1.0, None], 'name': 'a\\\\udcff', 'not_finite': {'delta.1': 'inf'}}
    """
    not_finite: dict[str, str] = {}
    return _writable(content, "", not_finite) | {"not_finite": not_finite}


def _writable(value, path: str, not_finite: dict[str, str]):
    if isinstance(value, dict):
        join = f"{path}." if path else ""
        return {_text(key): _writable(item, f"{join}{key}", not_finite) for key, item in value.items()}
    if isinstance(value, list):
        return [_writable(item, f"{path}.{index}", not_finite) for index, item in enumerate(value)]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float) and not math.isfinite(value):
        not_finite[_text(path)] = str(value)
        return None
    return value


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def errors(statistic: Statistic) -> dict:
    """What every statistic says of its error."""
    interval = statistic.interval()
    return {
        "stderr": statistic.stderr,
        "stderr_reason": statistic.stderr_reason,
        "jackknife_stderr": statistic.jackknife_stderr,
        "interval": None if interval is None else list(interval),
        "warnings": list(statistic.warnings),
    }


def _bins(bins: Bins, counted: str) -> list[dict]:
    stderr = [None] * len(bins.first) if bins.stderr is None else bins.stderr.tolist()
    columns = (bins.first.tolist(), bins.last.tolist(), bins.contribution.tolist(), stderr, bins.count.tolist())
    names = ("first", "last", "contribution", "stderr", counted)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
