"""dentropy: what a weight update does to a language-model policy's entropy, predicted before and measured after.

    rollouts ─ PackedBatch ─► measure(policy, batch, direction, eta=...) ─► SequenceSums ─► slope / curvature / importance

`measure` alone touches a model; everything statistical is a pure function of the table it leaves.
"""

from dentropy.batch import PackedBatch
from dentropy.direction import Direction
from dentropy.estimators import (
    by_length,
    by_position,
    curvature,
    importance,
    importance_diagnostics,
    on_policy_audit,
    predict,
    prediction_error,
    rollouts_needed,
    slope,
    token_attribution,
    trust_range,
)
from dentropy.forward_mode import moved_weights
from dentropy.measure import measure
from dentropy.noise_floor import noise_floor
from dentropy.parameter_attribution import parameter_attribution
from dentropy.policy import Policy
from dentropy.policy_gradient import policy_gradient_direction
from dentropy.probe import ProbeResult, probe
from dentropy.rollout import sample
from dentropy.sequence_sums import sequence_sums
from dentropy.tables import SequenceSums, TokenStats
from dentropy.token_stats import linear_token_stats, token_stats

__version__ = "0.1.0"

__all__ = [
    "Direction",
    "PackedBatch",
    "Policy",
    "ProbeResult",
    "SequenceSums",
    "TokenStats",
    "by_length",
    "by_position",
    "curvature",
    "importance",
    "importance_diagnostics",
    "linear_token_stats",
    "measure",
    "moved_weights",
    "noise_floor",
    "on_policy_audit",
    "parameter_attribution",
    "policy_gradient_direction",
    "predict",
    "prediction_error",
    "probe",
    "rollouts_needed",
    "sample",
    "sequence_sums",
    "slope",
    "token_attribution",
    "token_stats",
    "trust_range",
]
