"""`forecast` of results.json, as `dentropy/results.md` describes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dentropy.estimators import Divergence, ExchangeRate, Forecast, MeanChange, Statistic
from dentropy.estimators.reweighting import LARGEST_LOG_WEIGHT
from dentropy.experiment.entries import errors

NO_REWARD = "the rollouts have no reward"
NOT_ASKED = "not asked for"
NO_FISHER = "the table at the base weights has no column fisher"
BEYOND = f"log-weights of a rollout go beyond {LARGEST_LOG_WEIGHT:g} nats: too far to measure"


def forecast(found: Forecast, etas: Sequence[float]) -> dict:
    """The entry, with one change for each of `etas`."""
    reasons = {}
    if found.reward is None:
        reasons = {"reward": NO_REWARD, "exchange_rate": NO_REWARD}
    if not found.pass_at_k:
        reasons["pass_at_k"] = NO_REWARD if found.reward is None else NOT_ASKED
    if found.kl.fisher is None:
        reasons["fisher"] = NO_FISHER
    return {
        "entropy": _mean(found.entropy, etas),
        "reward": None if found.reward is None else _mean(found.reward, etas),
        "length": _mean(found.length, etas),
        "kl": {"sequence": _divergence(found.kl, etas), "token": _divergence(found.kl_per_token, etas)},
        "pass_at_k": [{"k": k, **_mean(change, etas)} for k, change in found.pass_at_k.items()] or None,
        "exchange_rate": None if found.exchange_rate is None else _rates(found, etas),
        "reasons": reasons,
    }


def _mean(change: MeanChange, etas: Sequence[float]) -> dict:
    return {"base": change.base, "slope": _statistic(change.slope), "changes": _at(etas, change.changes, _statistic)}


def _divergence(found: Divergence, etas: Sequence[float]) -> dict:
    changes = _at(etas, found.measured, _statistic)
    for entry in changes:
        predicted = found.forecast(entry["eta"])
        entry["predicted"] = None if predicted is None else predicted.value
        entry["predicted_stderr"] = None if predicted is None else predicted.stderr
    return {"fisher": None if found.fisher is None else _statistic(found.fisher), "changes": changes}


def _rates(found: Forecast, etas: Sequence[float]) -> dict:
    return {"slope": _rate(found.exchange_rate), "changes": _at(etas, found.exchange_rates, _rate)}


def _at(etas: Sequence[float], found: dict, entry: Callable[..., dict]) -> list[dict]:
    """An entry for each η; with nulls where it is too far away to be measured."""
    return [{"eta": eta, **entry(found.get(eta))} for eta in etas]


def _statistic(found: Statistic | None) -> dict:
    if found is None:
        nothing = {"value": None, "stderr": None, "stderr_reason": BEYOND, "jackknife_stderr": None}
        return nothing | {"interval": None, "warnings": []}
    return {"value": found.value, **errors(found)}


def _rate(found: ExchangeRate | None) -> dict:
    if found is None:
        return {"value": None, "interval": None, "reason": BEYOND}
    interval = None if found.interval is None else list(found.interval)
    return {"value": found.value, "interval": interval, "reason": found.reason}
