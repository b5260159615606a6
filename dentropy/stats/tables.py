"""The two tables of dentropy: one row per token (`TokenStats`) and one row per rollout (`SequenceSums`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dentropy.shown import count, data_frame, html_table, line

SHOWN_ROWS = 5  # in a notebook
OF_TOKENS = ("tokens", "sampler_tokens")  # fields of a table that are no columns


class TokenStats(NamedTuple):
    """Log-probability and entropy of each token's distribution, with derivatives along one direction.

    With p = softmax(z) over the vocabulary, y the token and a dot for d/dη, the fields are tensors of shape
    [N] in nats (derivatives: nats per unit of η), float32, or float64 where the inputs were float64. What was
    not asked for is None: the first derivatives and `fisher` need ż, the second derivatives ż and z̈.

    ============ ========================================================
    `logp`       z_y − lse(z)
    `entropy`    lse(z) − E_p[z]
    `dlogp`      ż_y − E_p[ż]
    `dentropy`   −Cov_p(z, ż)
    `d2logp`     z̈_y − E_p[z̈] − Var_p(ż)
    `d2entropy`  −(Var_p(ż) + Cov_p(z, z̈) + E_p[(z − E z)(ż − E ż)²])
    `fisher`     Var_p(ż), the Fisher information about η in the token
    ============ ========================================================
    """

    logp: Tensor
    entropy: Tensor
    dlogp: Tensor | None = None
    dentropy: Tensor | None = None
    d2logp: Tensor | None = None
    d2entropy: Tensor | None = None
    fisher: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class SequenceSums:
    """One row per rollout: all that the estimators need to know about a forward pass.

    The columns are NumPy float64 arrays of shape [S] (`group` and `rollout` int64), in nats. For a rollout of
    tokens k = 1..T with log-probabilities logp_k, entropies h_k and derivatives dlogp_k, dh_k, d2logp_k,
    d2h_k, variances fisher_k, and with A_j = Σ_{k<j} dlogp_k and B_j = A_j² + Σ_{k<j} d2logp_k, the derivatives
    of the weight that the tokens before j give it:

    =================== ============================== ===============================================
    `n_tokens`          T                              always
    `logp`              Σ logp_k                       always
    `entropy`           Σ h_k                          always
    `dlogp`             Σ dlogp_k                      None when the pass had no tangent
    `dentropy`          Σ dh_k                         None when the pass had no tangent
    `entropy_dlogp`     Σ h_k dlogp_k                  None when the pass had no tangent
    `entropy_to_go`     Σ_k dlogp_k Σ_{j>k} h_j        None when the pass had no tangent
    `length_to_go`      Σ_k (T − k) dlogp_k            None when the pass had no tangent
    `fisher`            Σ fisher_k                     None when the pass had no tangent
    `d2logp`            Σ d2logp_k                     None below second order
    `d2entropy`         Σ d2h_k                        None below second order
    `dentropy_to_go`    Σ_j A_j dh_j                   None below second order
    `entropy_to_go_2`   Σ_j B_j h_j                    None below second order
    `length_to_go_2`    Σ_j B_j                        None below second order
    `second_order_step` step in η of the differences   None unless d2logp and d2entropy are differences
    `sampler_logp`      Σ logp_k of the sampler        None unless the rollouts are said to be another one's
    `group`             the prompt the rollout is for  always
    `rollout`           its index in the batch         always
    =================== ============================== ===============================================

    `tokens` holds the per-token values behind the rows (on the CPU, packed in row order), or None, and
    `sampler_tokens`, float64 [N], what the sampler's log-probability of each of these tokens was.
    Columns are converted to these types.

    Raises:
        ValueError: a column that is not of shape [S] or not made of numbers, `group` and `rollout` of integers.

    Example:
        >>> import numpy as np
        >>> from dentropy.stats.tables import SequenceSums
        >>> sums = SequenceSums(n_tokens=np.array([2.0]), logp=np.array([-1.5]), entropy=np.array([1.2]),
        ...                     group=np.array([0]), rollout=np.array([0]))
        >>> len(SequenceSums.concatenate([sums, sums]))
        2
    """

    n_tokens: np.ndarray
    logp: np.ndarray
    entropy: np.ndarray
    dlogp: np.ndarray | None = None
    dentropy: np.ndarray | None = None
    entropy_dlogp: np.ndarray | None = None
    entropy_to_go: np.ndarray | None = None
    length_to_go: np.ndarray | None = None
    fisher: np.ndarray | None = None
    d2logp: np.ndarray | None = None
    d2entropy: np.ndarray | None = None
    dentropy_to_go: np.ndarray | None = None
    entropy_to_go_2: np.ndarray | None = None
    length_to_go_2: np.ndarray | None = None
    second_order_step: np.ndarray | None = None
    sampler_logp: np.ndarray | None = None
    group: np.ndarray
    rollout: np.ndarray
    tokens: TokenStats | None = None
    sampler_tokens: np.ndarray | None = None

    def __post_init__(self):
        shape = np.shape(self.n_tokens)
        for name, column in self.columns().items():
            column = np.asarray(column)
            if column.ndim != 1 or column.shape != shape:
                raise ValueError(
                    f"{name}: shape {list(column.shape)}, expected [S] as n_tokens, which has {list(shape)}"
                )
            integer = name in ("group", "rollout")
            if column.dtype.kind not in ("iu" if integer else "fiu"):
                expected = "integers" if integer else "numbers"
                raise ValueError(f"{name}: dtype {column.dtype}, expected {expected}")
            object.__setattr__(self, name, column.astype(np.int64 if integer else np.float64, copy=False))

    def __len__(self) -> int:
        return len(self.n_tokens)

    def __repr__(self) -> str:
        n_tokens = self.n_tokens.sum()
        return line(
            self,
            f"{count(len(self), 'rollout')} of {count(np.unique(self.group).size, 'prompt')}",
            count(int(n_tokens), "token"),
            f"entropy {self.entropy.sum() / n_tokens:.4g} nats per token" if n_tokens else None,
            count(len(self.columns()), "column"),
            None if self.tokens is None else "with its tokens",
        )

    def _repr_html_(self) -> str:
        """The first rows, for a notebook."""
        columns = self.columns()
        rows = zip(*(column[:SHOWN_ROWS].tolist() for column in columns.values()), strict=True)
        caption = f"{repr(self)[1:-1]}; {'all' if len(self) <= SHOWN_ROWS else f'the first {SHOWN_ROWS}'} rows"
        return html_table(caption, list(columns), [[f"{value:.4g}" for value in row] for row in rows])

    def to_pandas(self):
        """The columns that are present as a pandas DataFrame, a row per rollout; ImportError without pandas.

        Example:
            >>> import numpy as np
            >>> one = np.ones(1)
            >>> SequenceSums(n_tokens=one, logp=-one, entropy=one, group=[0], rollout=[0]).to_pandas().shape
            (1, 5)
        """
        return data_frame(self.columns())

    def columns(self) -> dict[str, np.ndarray]:
        """The columns that are present, by name, in the order of the table above (without those of tokens)."""
        present = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in OF_TOKENS}
        return {name: column for name, column in present.items() if column is not None}

    def take(self, rows) -> SequenceSums:
        """The rows `rows`, with their tokens where these were kept, in that order."""
        rows, kept = np.asarray(rows, dtype=np.int64), {}
        if self.tokens is not None:
            lengths = self.n_tokens.astype(np.int64)
            starts, taken = (np.cumsum(lengths) - lengths)[rows], lengths[rows]
            index = np.repeat(starts - np.cumsum(taken) + taken, taken) + np.arange(taken.sum())
            in_torch = torch.from_numpy(index)
            kept["tokens"] = TokenStats(*(None if x is None else x[in_torch] for x in self.tokens))
            kept["sampler_tokens"] = None if self.sampler_tokens is None else self.sampler_tokens[index]
        return SequenceSums(**{name: column[rows] for name, column in self.columns().items()}, **kept)

    @classmethod
    def concatenate(cls, parts: Sequence[SequenceSums]) -> SequenceSums:
        """The rows of all `parts`, in order; `group` and `rollout` are kept as they are.

        Raises:
            ValueError: no parts, or parts that do not all have the same columns and per-token values.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts: empty, expected at least one SequenceSums")
        names, token_fields = list(parts[0].columns()), _token_fields(parts[0])
        for index, part in enumerate(parts):
            columns, tokens = list(part.columns()), _token_fields(part)
            if (columns, tokens) != (names, token_fields):
                raise ValueError(
                    f"parts[{index}]: columns {columns} and tokens {tokens}, "
                    f"expected those of parts[0], {names} and {token_fields}"
                )
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        tokens = {name: torch.cat([getattr(part.tokens, name) for part in parts]) for name in token_fields}
        if tokens and parts[0].sampler_logp is not None:
            columns["sampler_tokens"] = np.concatenate([part.sampler_tokens for part in parts])
        return cls(**columns, tokens=TokenStats(**tokens) if tokens else None)


def _token_fields(sums: SequenceSums) -> list[str]:
    """Names of the per-token values that are kept."""
    return [] if sums.tokens is None else [n for n, v in sums.tokens._asdict().items() if v is not None]


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What statistics are computed in: float64 where any of the tensors is, float32 otherwise."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return torch.float64 if torch.float64 in dtypes else torch.float32
