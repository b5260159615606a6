"""dentropy: what a weight update does to a language-model policy's entropy, predicted before and measured after.

    rollouts ─ PackedBatch ─► measure(policy, batch, direction) ─► SequenceSums ─► slope / curvature / importance

`measure` alone touches a model; everything statistical is a pure function of the table it leaves.
"""

from importlib import import_module

__version__ = "0.1.0"

# Where each public name lives. It is imported at its first use, so that `import dentropy` is cheap.
_HOMES = {
    "dentropy.estimators": [
        "bonus_coefficient",
        "by_label",
        "by_lag",
        "by_length",
        "by_position",
        "Forecast",
        "base_weights",
        "curvature",
        "forecast",
        "grade_proxy",
        "importance",
        "importance_diagnostics",
        "on_policy_audit",
        "predict",
        "prediction_error",
        "rollouts_needed",
        "slope",
        "token_attribution",
        "trust_range",
        "update_proxies",
    ],
    "dentropy.experiment.probe": ["probe"],
    "dentropy.experiment.results": ["ProbeResult"],
    "dentropy.experiment.saved_run": ["SavedRun"],
    "dentropy.experiment.step_watch": ["StepWatch", "watch_step"],
    "dentropy.model.direction": ["Direction"],
    "dentropy.model.policy": ["Policy"],
    "dentropy.passes.bonus_audit": ["bonus_audit"],
    "dentropy.passes.cross_fit": ["cross_fitted"],
    "dentropy.passes.entropy_bonus": ["bonus_for", "step_with_bonus"],
    "dentropy.passes.entropy_gradient": ["entropy_gradient"],
    "dentropy.passes.forward_mode": ["moved_weights"],
    "dentropy.passes.mean_discriminant": ["mean_discriminant"],
    "dentropy.passes.measure": ["measure"],
    "dentropy.passes.noise_floor": ["noise_floor"],
    "dentropy.passes.parameter_attribution": ["parameter_attribution"],
    "dentropy.passes.policy_gradient": ["policy_gradient_direction", "policy_gradient_step"],
    "dentropy.passes.policy_loss": ["PolicyLoss"],
    "dentropy.passes.token_groups": ["token_groups"],
    "dentropy.passes.update_attribution": ["update_attribution"],
    "dentropy.passes.update_groups": ["step_without", "update_groups"],
    "dentropy.rollouts.batch": ["PackedBatch"],
    "dentropy.rollouts.reading": ["read_rollouts"],
    "dentropy.rollouts.sampling": ["sample"],
    "dentropy.stats.sequence_sums": ["sequence_sums"],
    "dentropy.stats.tables": ["SequenceSums", "TokenStats"],
    "dentropy.stats.token_stats": ["linear_token_stats", "token_stats"],
    "dentropy": ["reference"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "reference":
        return import_module("dentropy.reference")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
