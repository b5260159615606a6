"""What every estimator returns: a value, its standard errors, and what is doubtful about them, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np

from dentropy.estimators.groups import Groups
from dentropy.estimators.jackknife import LeftOut
from dentropy.estimators.optional import load
from dentropy.shown import count, line, number

# With 9 degrees of freedom a standard error is itself uncertain by 1/sqrt(2·9), about a quarter of itself.
FEW_DEGREES = 9
# More than all the others together: one set of 16 normal groups in fifty has such a one.
DOMINANT_SHARE = 0.5
# Two standard errors within a tenth of each other do not disagree: each is itself uncertain by more than that
# for up to 51 groups (1/sqrt(2·50) = 0.1), and beyond that the two have the same limit.
DISAGREEMENT = 1.1
# A standard error this far below the values it is made of is rounding noise.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False, kw_only=True)
class Statistic:
    """A number computed from rollouts, with its standard error clustered by prompt.

    value             the number
    stderr            its standard error: the jackknife's, or the delta method's where no unit can be left out;
                      None where the groups do not allow one
    stderr_reason     why stderr is None, in words; None where there is a stderr
    delta_stderr      by the delta method, from the influence values, see `clustered_stderr`
    jackknife_stderr  by leaving out one group at a time ("fixed": one rollout)
    jackknife_reason  why jackknife_stderr is None, in words
    dof               degrees of freedom of stderr, see `clustered_stderr`
    warnings          one sentence for each reason to doubt stderr; empty where there is none
    doubts            those of them that the table gives rise to: they hold of whatever comes from it
    influence         float64 [S], ψ_i: the derivative of value with respect to rollout i's weight
    leave_one_out     float64 [G], value without each group in the order of the sorted labels ("fixed": [S],
                      without each rollout); None with jackknife_reason
    groups            the prompt groups, and what prompts they are of
    group             int64 [S], the prompt group of each rollout
    prompts           "random" or "fixed"
    per               "token" or "sequence"
    """

    value: float
    stderr: float | None
    stderr_reason: str | None
    delta_stderr: float | None
    jackknife_stderr: float | None
    jackknife_reason: str | None
    dof: float | None
    warnings: tuple[str, ...]
    doubts: tuple[str, ...]
    influence: np.ndarray
    leave_one_out: np.ndarray | None
    groups: Groups
    per: str

    @classmethod
    def of(
        cls,
        value: float,
        influence: np.ndarray,
        left_out: LeftOut,
        groups: Groups,
        *,
        doubts: tuple[str, ...] = (),
        **fields,
    ) -> Self:
        """The statistic with its errors: all that follows from ψ and from what `leave_one_out` gave.

        doubts: warnings that the table gives rise to, see `EntropyRatio`. fields: `per`, and what a subclass adds.
        """
        stderr = delta_stderr = jackknife_stderr = dof = None
        warnings: list[str] = []
        reason = groups.refusal()
        if reason is None:
            terms = groups.variance_terms(influence)
            stderr = delta_stderr = float(np.sqrt(terms.sum()))
            dof = groups.degrees(terms)
            warnings += [*doubts, *_concentration(terms, groups)]
            if left_out[0] is None:
                warnings.append(f"no jackknife standard error: {left_out[1]}")
            else:
                stderr = jackknife_stderr = groups.jackknife_stderr(left_out[0])
                if _disagree(jackknife_stderr, delta_stderr, scale=np.abs(left_out[0]).max()):
                    warnings.append(
                        f"the jackknife's standard error {stderr:.3g} is reported, the delta method gives "
                        f"{delta_stderr:.3g}: the estimate is far from linear in the rollouts"
                    )
        return cls(
            value=float(value),
            stderr=stderr,
            stderr_reason=reason,
            delta_stderr=delta_stderr,
            jackknife_stderr=jackknife_stderr,
            jackknife_reason=left_out[1],
            dof=dof,
            warnings=tuple(warnings),
            doubts=doubts,
            influence=influence,
            leave_one_out=left_out[0],
            groups=groups,
            **fields,
        )

    def __repr__(self) -> str:
        what, unit, *more = self._shown()
        told = f"{what} {number(self.value, self.stderr, unit)}".lstrip()
        reason = None if self.stderr_reason is None else f"no standard error: {self.stderr_reason}"
        doubts = count(len(self.warnings), "warning") if self.warnings else None
        return line(self, told, *more, repr(self.groups), reason, doubts)

    def _shown(self) -> tuple[str, ...]:
        """For the repr: the number's name and unit, and what else to say of it."""
        return "", ""

    @property
    def group(self) -> np.ndarray:
        return self.groups.group

    @property
    def prompts(self) -> str:
        return self.groups.prompts

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """value ± t·stderr, t of Student's distribution with dof degrees of freedom; None without a stderr.

        Raises:
            ValueError: a level that is not between 0 and 1.
            ImportError: without scipy.

        Example:
            >>> import torch
            >>> from dentropy import sequence_sums, slope, token_stats
            >>> seeded = torch.Generator().manual_seed(0)
            >>> logits, dlogits = torch.randn(2, 6, 5, generator=seeded, dtype=torch.float64)
            >>> stats = token_stats(logits, torch.tensor([1, 4, 0, 2, 2, 0]), dlogits)
            >>> estimate = slope(sequence_sums(stats, torch.tensor([0, 3, 4, 6])))
            >>> low, high = estimate.interval()
            >>> low < estimate.value < high
            True
        """
        if not 0 < level < 1:
            raise ValueError(f"level: {level!r}, expected a number between 0 and 1")
        if self.stderr is None:
            return None
        half = float(load("scipy.special", "an interval").stdtrit(self.dof, (1 + level) / 2)) * self.stderr
        return self.value - half, self.value + half


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Estimate(Statistic):
    """A derivative of the entropy along a direction, or what follows from one, with its error and its origin.

    Units are nats per token (nats per sequence with per="sequence") per unit of η for a slope, per unit of η²
    for a curvature. The fields of `Statistic`, and:

    contributions  float64 [S], one per rollout; they sum to value
    parts          the named terms of value (see `slope`, `curvature`, `predict` and `prediction_error`)
    part_stderrs   standard errors of those of slopes and curvatures, by the delta method; None where groups allow none
    name           "slope", "curvature", "prediction", "prediction error" or "difference"
    estimator      which form of the slope was used; empty for a difference of two
    """

    contributions: np.ndarray
    parts: dict[str, float]
    part_stderrs: dict[str, float | None] = field(default_factory=dict)
    name: str
    estimator: str

    def _shown(self) -> tuple[str, ...]:
        if self.name == "difference":  # of slopes, curvatures or measurements: it does not know which
            return self.name, ""
        power = {"slope": " per unit of η", "curvature": " per unit of η²"}.get(self.name, "")
        return f"{self.estimator} {self.name}", f"nats per {self.per}{power}"


def check_estimate(argument: str, found: object, name: str, estimator: str | None = None) -> None:
    """ValueError unless `found` is an Estimate of that name (and estimator)."""
    kind = found.name if isinstance(found, Estimate) else type(found).__name__
    if kind != name:
        raise ValueError(f"{argument}: a {kind}, expected a {name}")
    if estimator not in (None, found.estimator):
        raise ValueError(f"{argument}: the {found.estimator} {name}, expected the {estimator} one")


def check_same_rollouts(argument: str, found: Statistic, groups: Groups, per: str) -> None:
    """ValueError unless `found` is of the rollouts of these groups, with these prompts and `per`."""
    for word, value, expected in (("per", found.per, per), ("prompts", found.prompts, groups.prompts)):
        if value != expected:
            raise ValueError(f"{argument}: {word}={value!r}, expected {expected!r}")
    if not np.array_equal(found.group, groups.group):
        raise ValueError(f"{argument}: of other rollouts, expected the same groups")


def _disagree(first: float, second: float, scale: float) -> bool:
    """Whether two standard errors of values of size `scale` part by more than a factor, and than rounding."""
    larger = max(first, second)
    return larger > DISAGREEMENT * min(first, second) and larger > ROUNDING * scale


def _concentration(terms: np.ndarray, groups: Groups) -> list[str]:
    """Warnings about a standard error, the root of the sum of `terms`, that rests on few of them."""
    warnings = []
    if groups.dof < FEW_DEGREES:
        warnings.append(
            f"few groups: {groups.count} give {groups.dof:.3g} degrees of freedom, so the standard error is itself "
            f"uncertain by {1 / np.sqrt(2 * groups.dof):.0%} or more"
        )
    total, largest = terms.sum(), int(np.argmax(terms))
    if terms[largest] > DOMINANT_SHARE * total:
        share = terms[largest] / total
        warnings.append(f"{groups.unit(largest)} alone makes {share:.0%} of the squared standard error")
    return warnings
