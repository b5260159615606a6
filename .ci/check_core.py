"""With the core dependencies alone, `import dentropy` works and what needs no model runs."""

import sys
from importlib.util import find_spec

import torch

import dentropy

for package in ("transformers", "safetensors", "matplotlib", "scipy", "arviz_stats", "tqdm", "jsonschema"):
    assert find_spec(package) is None, f"{package} is installed: this says nothing of the core dependencies"

generator = torch.Generator().manual_seed(0)
hidden, dhidden = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
targets, ends = torch.tensor([1, 4, 0, 2, 2, 0]), [0, 3, 4, 6]

by_head = dentropy.linear_token_stats(hidden, weight, targets, dhidden)
by_logits = dentropy.token_stats(hidden @ weight.T, targets, dhidden @ weight.T)
for name, values in by_logits._asdict().items():
    assert values is None or torch.allclose(values, getattr(by_head, name)), name
base = dentropy.sequence_sums(by_logits, ends)
moved = dentropy.sequence_sums(dentropy.token_stats((hidden + 1e-6 * dhidden) @ weight.T, targets), ends)
exact = dentropy.slope(base, estimator="exact").value
assert abs(dentropy.importance(base, moved).delta / 1e-6 - exact) < 1e-4 * abs(exact)
assert "transformers" not in sys.modules
print("core dependencies: token_stats, linear_token_stats, sequence_sums, slope and importance run")
