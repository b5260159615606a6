"""The estimators need NumPy alone: what else they use is imported when it is asked for."""

import subprocess
import sys

import pytest
from tables import one_table

from dentropy.estimators import slope

# Tables are anything with the columns. None in sys.modules makes an import fail as if it were not installed.
NUMPY_ALONE = """
import sys
for name in ("torch", "scipy", "arviz_stats", "pandas", "transformers", "triton"):
    sys.modules[name] = None
import types
import numpy as np
import dentropy.estimators as e

names = "n_tokens logp entropy dlogp dentropy entropy_dlogp entropy_to_go length_to_go d2logp d2entropy".split()
names += ["dentropy_to_go", "entropy_to_go_2", "length_to_go_2"]
columns = dict(zip(names, np.random.default_rng(0).uniform(1, 2, (len(names), 40))))
columns["n_tokens"] = np.full(40, 3.0)
def table(**more):
    known = columns | {"sampler_logp": None} | more
    return types.SimpleNamespace(**known, group=np.arange(40) // 4, rollout=np.arange(40))
tokens = types.SimpleNamespace(**{name: np.ones(120) for name in ("logp", "entropy", "dlogp", "dentropy")})
base, moved = table(tokens=tokens), table(logp=columns["logp"] + 0.1, tokens=tokens)

first, second, measured = e.slope(base), e.curvature(base), e.importance(base, moved)
e.curvature(base, estimator="causal"), e.importance(base, moved, weights="prefix")
e.trust_range(first, second)
error = e.prediction_error(e.predict(first, 0.1, second), measured)
e.token_attribution(base), e.by_position(base), e.by_length(base), e.by_lag(base), e.slope(base, horizon=1)
e.on_policy_audit(base), e.rollouts_needed(first, 0.1)
assert all(np.isfinite([s.value, s.stderr]).all() for s in (first, second, measured, error))
print(sorted({name.split(".")[0] for name in sys.modules} & {"numpy", "dentropy", "xarray", "matplotlib"}))
"""


def test_importing_and_estimating_needs_numpy_alone():
    done = subprocess.run([sys.executable, "-c", NUMPY_ALONE], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "['dentropy', 'numpy']"), done.stderr


def test_what_is_missing_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r'an interval needs scipy: pip install "dentropy\[probe\]"'):
        slope(one_table()).interval()
