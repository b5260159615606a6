"""The run folder: results.json, rollouts.csv and the figures; `dentropy/results.md` describes them.

The folder appears whole or not at all: it is written under a temporary name next to its place and renamed at
the end.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dentropy.estimators import by_length, by_position, token_attribution
from dentropy.passes.parameter_attribution import by_kind, by_layer

if TYPE_CHECKING:
    from dentropy.experiment.probe import ProbeResult

SCHEMA_VERSION = 1
RESULTS, ROLLOUTS, REPORT = "results.json", "rollouts.csv", "report.html"
SHOWN_ROLLOUTS = 24


def check_out(out: str | Path) -> Path:
    """`out` as a path, if a run folder can be written there: call it before any work.

    Raises ValueError where `out` is a file or a folder that is not empty, or where its parent cannot be
    written.
    """
    out = Path(out)
    if out.is_dir():
        if any(out.iterdir()):
            raise ValueError(f"out: folder {out} exists and is not empty; expected a new or an empty one")
    elif out.exists() or out.is_symlink():
        raise ValueError(f"out: {out} exists and is not a folder")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"out: {out} cannot be made, {above} is not a folder that can be written")
    return out


def save(result: ProbeResult, out: str | Path, tokenizer=None) -> Path:
    """Write the run folder of `result` to `out` and return its path; see `check_out` for what is refused."""
    from dentropy.experiment import figures, report

    out = check_out(out)
    content, columns = document(result), table(result)
    page = report.html(content, largest_rollouts(result, tokenizer))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    unfinished.mkdir()
    try:
        with open(unfinished / RESULTS, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False, ensure_ascii=False)
            file.write("\n")
        with open(unfinished / ROLLOUTS, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
        (unfinished / REPORT).write_text(page, encoding="utf-8")
        figures.write(content, columns, unfinished)
        if out.is_dir():
            out.rmdir()  # empty, as checked: an error here if it is no longer
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def load(folder: str | Path) -> dict:
    """The content of results.json in a run folder.

    Raises ValueError where the folder, the file or its fields are not those of a finished run of a known
    schema.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"{folder}: not a run folder, it holds no {RESULTS}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version is {found!r}, this version reads {SCHEMA_VERSION}")
    return content


def document(result: ProbeResult) -> dict:
    """The content of results.json: plain numbers, strings, lists and dicts; see results.md."""
    base, batch = result.base, result.batch
    n_tokens = int(base.n_tokens.sum())
    content = {
        "schema_version": SCHEMA_VERSION,
        "versions": _versions(),
        "device": result.device,
        "dtype": result.dtype,
        "source": dict(result.source),
        "seeds": dict(result.seeds),
        "n_sequences": len(base),
        "n_tokens": n_tokens,
        "n_groups": int(np.unique(base.group).size),
        "temperature": float(batch.temperature),
        "step_size": float(result.step_size),
        "prompts": result.prompts,
        "base_entropy": result.base_entropy,
        "base_entropy_stderr": result.base_stderr,
        "scale": 1 / n_tokens,
        "slope": [_slope_entry(estimate) for estimate in result.slopes.values()],
        "curvature": None if result.curvature is None else _curvature_entry(result),
        "trust": None if result.trust is None else _trust_entry(result.trust),
        "measured": [_measured_entry(change, result.slopes["causal"]) for change in result.changes],
        "noise_floor": result.noise_floor,
        "attribution": _attribution_entry(result),
        "fresh_check": None if result.fresh is None else dict(vars(result.fresh)),
        "audit": _audit_entry(result),
    }
    not_finite: dict[str, str] = {}
    content = _without_infinities(content, "", not_finite)
    return content | {"not_finite": not_finite}


def table(result: ProbeResult) -> dict[str, np.ndarray]:
    """The columns of rollouts.csv, [S] each: one row per rollout, in the batch's order; see results.md."""
    order = np.argsort(result.base.rollout)
    base = {name: column[order] for name, column in result.base.columns().items()}
    columns = {"rollout": base.pop("rollout"), "group": base.pop("group")}
    if result.batch.reward is not None:
        columns["reward"] = result.batch.reward[columns["rollout"]]
    columns |= base
    scale = 1 / base["n_tokens"].sum()
    columns["slope_uncorrected"] = (base["dentropy"] + base["entropy_to_go"]) * scale
    for name, estimate in result.slopes.items():
        columns[f"slope_{name}"] = estimate.contributions[order]
    if result.curvature is not None:
        columns["curvature"] = result.curvature.contributions[order]
    for index, change in enumerate(result.changes):
        columns[f"log_weight_{index}"] = change.measured.log_weights[order]
        columns[f"moved_entropy_{index}"] = change.moved.entropy[np.argsort(change.moved.rollout)]
        columns[f"delta_contribution_{index}"] = change.measured.contributions[order]
    return columns


def _errors(statistic) -> dict:
    """What every statistic says of its error."""
    interval = statistic.interval()
    return {
        "stderr": statistic.stderr,
        "stderr_reason": statistic.stderr_reason,
        "jackknife_stderr": statistic.jackknife_stderr,
        "interval": None if interval is None else list(interval),
        "warnings": list(statistic.warnings),
    }


def largest_rollouts(result: ProbeResult, tokenizer=None) -> list[dict]:
    """The rollouts that contribute most to the exact slope, with what each of their tokens does, for the report."""
    base, batch = result.base, result.batch
    contributions = result.slopes["exact"].contributions
    by_token = np.split(token_attribution(base, estimator="exact"), np.cumsum(base.n_tokens).astype(int)[:-1])

    def text(ids: list[int]) -> str:
        return " ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.decode(ids)

    entries = []
    for row in np.argsort(-np.abs(contributions), kind="stable")[:SHOWN_ROLLOUTS].tolist():
        i = int(base.rollout[row])
        shares = zip(batch.response(i), by_token[row].tolist(), strict=True)
        entries.append(
            {
                "rollout": i,
                "group": int(base.group[row]),
                "reward": None if batch.reward is None else float(batch.reward[i]),
                "prompt": text(batch.prompt(i)),
                "contribution": float(contributions[row]),
                "tokens": [[text([token]), share] for token, share in shares],
            }
        )
    return entries


def _slope_entry(estimate) -> dict:
    return {
        "estimator": estimate.estimator,
        "value": estimate.value,
        **_errors(estimate),
        **estimate.parts,
        "part_stderrs": dict(estimate.part_stderrs),
    }


def _curvature_entry(result: ProbeResult) -> dict:
    step = result.base.second_order_step
    return {
        "value": result.curvature.value,
        **_errors(result.curvature),
        **result.curvature.parts,
        "step": None if step is None else float(step[0]),
    }


def _trust_entry(trust) -> dict:
    return {"eta_star": trust.eta_star, **_errors(trust), "linear_until": trust.linear_limit}


def _measured_entry(change, slope) -> dict:
    measured, found, quadratic = change.measured, change.diagnostics, change.quadratic
    return {
        "eta": change.eta,
        "delta": measured.delta,
        **_errors(measured),
        "smoothed_delta": found.smoothed_delta,
        "below_noise_floor": change.below_noise,
        "verdict": found.verdict,
        "verdict_reason": found.reason,
        "moved_entropy": measured.moved_value,
        "predicted_linear": change.linear.value,
        "predicted_linear_stderr": change.linear.stderr,
        "predicted_quadratic": None if quadratic is None else quadratic.value,
        "predicted_quadratic_stderr": None if quadratic is None else quadratic.stderr,
        "predicted_uncorrected": change.eta * slope.parts["uncorrected"],
        "prediction_error": change.error.value,
        "prediction_error_stderr": change.error.stderr,
        "ess": measured.ess,
        "ess_fraction": measured.ess_fraction,
        "ess_tokens": measured.ess_tokens,
        "khat": {"w": found.khat, "wT": found.khat_tokens, "wH": found.khat_entropy},
        "khat_reason": found.khat_reason,
        "khat_threshold": found.khat_threshold,
        "max_weight": measured.max_weight,
        "mean_weight": measured.mean_weight,
        "log_weight_quantiles": dict(measured.log_weight_quantiles),
    }


def _attribution_entry(result: ProbeResult) -> dict:
    """Where the slope comes from: every list sums to the causal one, by_length to the exact one."""
    base = result.base
    positions, lengths = by_position(base, prompts=result.prompts), by_length(base, prompts=result.prompts)
    entry = {
        "by_position": _bin_entries(positions, "tokens"),
        "by_length": _bin_entries(lengths, "rollouts"),
        "by_layer": None,
        "by_kind": None,
        "parameters": None,
    }
    if result.parameters is not None:
        for name, shares in (
            ("by_layer", by_layer(result.parameters)),
            ("by_kind", by_kind(result.parameters)),
            ("parameters", result.parameters),
        ):
            entry[name] = [{"name": part, "contribution": share} for part, share in shares.items()]
    return entry


def _bin_entries(bins, counted: str) -> list[dict]:
    stderr = [None] * len(bins.first) if bins.stderr is None else bins.stderr.tolist()
    columns = (bins.first.tolist(), bins.last.tolist(), bins.contribution.tolist(), stderr, bins.count.tolist())
    names = ("first", "last", "contribution", "stderr", counted)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _audit_entry(result: ProbeResult) -> dict:
    checks = {"logp_plus_entropy": result.audit.logp_plus_entropy, "dlogp": result.audit.dlogp}
    sums = {f"slope_{name}": (e.contributions.sum(), e.value) for name, e in result.slopes.items()}
    for index, change in enumerate(result.changes):
        m = change.measured
        sums[f"delta_{index}"] = (m.contributions.sum(), m.moved_value - m.base_value)
    if result.parameters is not None:
        sums["parameters"] = (sum(result.parameters.values()), result.slopes["causal"].value)
    return {
        "rollouts_used": len(result.base),
        "rollouts_expected": len(result.batch),
        "tokens_used": int(result.base.n_tokens.sum()),
        "tokens_expected": int(result.batch.n_tokens),
        "contributions": {k: {"sum": float(total), "expected": float(value)} for k, (total, value) in sums.items()},
        "on_policy": {name: None if check is None else dict(vars(check)) for name, check in checks.items()},
        "rollouts_without_end": result.without_end,
        "warnings": [*result.audit.warnings, *_no_ends(result)],
    }


def _no_ends(result: ProbeResult) -> list[str]:
    """A warning where not one rollout has an end token: so they were written down, not sampled."""
    if result.without_end != len(result.batch):
        return []
    return [
        "no rollout ends with an end token of the policy: text dumps leave them out (append_eos puts them back), and "
        "without them the estimates miss every decision to stop"
    ]


def _versions() -> dict[str, str | None]:
    from dentropy import __version__

    found = {"dentropy": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "transformers", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _without_infinities(value, path: str, not_finite: dict[str, str]):
    """JSON has no inf and nan: such a number becomes null here, and `not_finite` says which it was."""
    if isinstance(value, dict):
        join = f"{path}." if path else ""
        return {key: _without_infinities(item, f"{join}{key}", not_finite) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item, f"{path}.{index}", not_finite) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        not_finite[path] = str(value)
        return None
    return value
