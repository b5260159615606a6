"""All combinations of what a test is parametrized by, most of them slow."""

from itertools import product

import pytest


def crossed(quick, **values):
    """parametrize over every combination of `values`; those of which `quick(*combination)` is false are slow."""
    return pytest.mark.parametrize(
        tuple(values),
        [
            pytest.param(*chosen, marks=[] if quick(*chosen) else pytest.mark.slow, id="-".join(map(str, chosen)))
            for chosen in product(*values.values())
        ],
    )
