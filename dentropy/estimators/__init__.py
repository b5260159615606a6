"""Estimators: pure float64 functions of the table of per-rollout sums.

They import nothing but NumPy; intervals load SciPy and the Pareto k̂ arviz-stats when they are asked for.
"""

from dentropy.estimators.attribution import Bins, by_label, by_lag, by_length, by_position, token_attribution
from dentropy.estimators.audit import AuditCheck, OnPolicyAudit, on_policy_audit
from dentropy.estimators.base_weight_measurement import base_weights
from dentropy.estimators.bonus import BonusCoefficient, bonus_coefficient
from dentropy.estimators.curvatures import curvature
from dentropy.estimators.diagnostics import ImportanceDiagnostics, importance_diagnostics
from dentropy.estimators.estimate import Estimate, Statistic
from dentropy.estimators.exchange_rates import ExchangeRate, exchange_rate
from dentropy.estimators.forecasts import Forecast, forecast
from dentropy.estimators.groups import clustered_stderr
from dentropy.estimators.importance_sampling import ImportanceResult, importance
from dentropy.estimators.kl import Divergence
from dentropy.estimators.mean_change import MeanChange
from dentropy.estimators.prediction import TrustRange, difference, predict, prediction_error, trust_range
from dentropy.estimators.proxies import Agreement, ProxyGrade, grade_proxy, update_proxies
from dentropy.estimators.sample_size import RolloutsNeeded, rollouts_needed
from dentropy.estimators.slopes import slope

__all__ = [
    "Agreement",
    "AuditCheck",
    "Bins",
    "BonusCoefficient",
    "Divergence",
    "Estimate",
    "ExchangeRate",
    "Forecast",
    "ImportanceDiagnostics",
    "ImportanceResult",
    "MeanChange",
    "OnPolicyAudit",
    "ProxyGrade",
    "RolloutsNeeded",
    "Statistic",
    "TrustRange",
    "base_weights",
    "bonus_coefficient",
    "by_label",
    "by_lag",
    "by_length",
    "by_position",
    "clustered_stderr",
    "curvature",
    "difference",
    "exchange_rate",
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
]
