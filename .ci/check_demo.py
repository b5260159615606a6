"""Holds what `dentropy demo` wrote against what the README promises."""

import csv
import json
import math
import sys
from pathlib import Path

folder = Path(sys.argv[1])
results = json.loads((folder / "results.json").read_text())
rows = list(csv.DictReader((folder / "rollouts.csv").open()))

assert results["n_sequences"] == len(rows) >= 512
assert results["n_tokens"] == sum(float(row["n_tokens"]) for row in rows)
assert math.isclose(results["scale"], 1 / results["n_tokens"])
entropy = sum(float(row["entropy"]) for row in rows) / results["n_tokens"]
assert math.isclose(results["base_entropy"], entropy, rel_tol=1e-12)

assert results["schema_version"] == 3
slopes = {slope["estimator"]: slope for slope in results["slope"]}
assert set(slopes) == {"causal", "exact", "mixed"}
for slope in slopes.values():
    parts = slope["pathwise"] + slope["score"] + slope["length_correction"]
    assert math.isclose(slope["value"], parts, rel_tol=1e-9) and slope["stderr"] > 0
assert len(results["measured"]) >= 3
for row in results["measured"]:
    assert math.isclose(row["predicted_linear"], row["eta"] * slopes["causal"]["value"], rel_tol=1e-9)
    for form in (row, row["sequence"]):
        assert form["stderr"] > 0 and 0 < form["ess_fraction"] <= 1 + 1e-9
    assert math.isclose(row["delta"] - row["sequence"]["delta"], row["sequence"]["difference"], rel_tol=1e-6)

for name, estimator in (("by_position", "causal"), ("by_lag", "causal"), ("by_length", "exact")):
    bins = results["attribution"][name]
    assert math.isclose(sum(b["contribution"] for b in bins), slopes[estimator]["value"], rel_tol=1e-9), name
    assert all(b["stderr"] > 0 for b in bins)
shares = results["attribution"]["by_layer"]
assert math.isclose(sum(share["contribution"] for share in shares), slopes["causal"]["value"], rel_tol=1e-4)
assert (folder / "report.html").read_text().startswith("<!doctype html>")

pictures = sorted(folder.glob("*.png"))
assert len(pictures) == 3 and all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
print(f"{folder.name}: {len(rows)} rollouts, {len(results['measured'])} etas, {len(pictures)} figures: as promised")
