"""What the public functions, the plain path and the reference refuse, in the same words."""

import math

import pytest
import torch
from draws import token_values

import dentropy
from dentropy import TokenStats, reference
from dentropy.stats import plain

every_implementation = pytest.mark.parametrize(
    "implementation", [dentropy, plain, reference], ids=["public", "plain", "reference"]
)
Z = torch.zeros(3, 5)
Y = torch.tensor([0, 4, 2])
H, W = torch.zeros(3, 2), torch.zeros(5, 2)

BAD_LOGITS = {
    r"logits: a list, expected a torch\.Tensor of shape \[N, V\]": dict(logits=[[0.0]]),
    r"logits: shape \[2, 3, 5\], expected \[N, V\]": dict(logits=torch.zeros(2, 3, 5)),
    r"logits: shape \[3, 0\], expected a vocabulary of at least 1": dict(logits=torch.zeros(3, 0)),
    r"logits: dtype torch\.int64, expected one of float16, bfloat16, float32,": dict(logits=Z.long()),
    r"dlogits: shape \[3, 4\], expected \[3, 5\] as logits": dict(dlogits=torch.zeros(3, 4)),
    r"dlogits: on meta, expected cpu": dict(dlogits=Z.to("meta")),
    r"dlogits: None, expected a tensor beside d2logits": dict(d2logits=Z),
    r"d2logits: shape \[1, 5\], expected \[3, 5\] as logits": dict(dlogits=Z, d2logits=Z[:1]),
}
BAD_HEADS = {
    r"hidden: shape \[2\], expected \[N, D\]": dict(hidden=torch.zeros(2)),
    r"weight: shape \[5, 3\], expected \[V, 2\]": dict(weight=torch.zeros(5, 3)),
    r"weight: shape \[0, 2\], expected a vocabulary of at least 1": dict(weight=torch.zeros(0, 2)),
    r"dhidden: shape \[2, 2\], expected \[3, 2\] as hidden": dict(dhidden=torch.zeros(2, 2)),
    r"dweight: shape \[2, 5\], expected \[5, 2\] as weight": dict(dweight=W.T),
    r"bias: shape \[3\], expected \[5\]": dict(bias=torch.zeros(3)),
    r"dbias: dtype torch\.bool": dict(dbias=torch.zeros(5, dtype=torch.bool)),
}
BAD_IN_BOTH = {
    r"targets: shape \[2\], expected \[3\], one token id per row": dict(targets=Y[:2]),
    r"targets: dtype torch\.float32, expected one of int32, int64": dict(targets=Y.float()),
    r"targets: on meta, expected cpu": dict(targets=Y.to("meta")),
    r"targets\[1\]: 5, expected a token id in \[0, 5\)": dict(targets=torch.tensor([0, 5, 9])),
    r"targets\[2\]: -1, expected a token id in \[0, 5\)": dict(targets=torch.tensor([0, 1, -1])),
    r"temperature: 0, expected a finite number above 0": dict(temperature=0),
    r"temperature: nan, expected a finite number above 0": dict(temperature=float("nan")),
    r"temperature: None, expected a finite number above 0": dict(temperature=None),
    r"softcap: -1\.0, expected a finite number above 0 or None": dict(softcap=-1.0),
    r"softcap: inf, expected a finite number above 0 or None": dict(softcap=float("inf")),
}
STATS = token_values(4, order=1)
BAD_SUMS = {
    r"stats: a tuple, expected a TokenStats": dict(stats=tuple(STATS)),
    r"stats\.entropy: shape \[3\], expected \[4\] as stats\.logp": dict(stats=STATS._replace(entropy=torch.ones(3))),
    r"stats\.entropy: a NoneType": dict(stats=STATS._replace(entropy=None)),
    r"stats\.logp: dtype torch\.int64": dict(stats=STATS._replace(logp=torch.ones(4).long())),
    r"stats\.dlogp and stats\.dentropy: one is None": dict(stats=STATS._replace(dentropy=None)),
    r"stats\.d2logp and stats\.d2entropy: one is None": dict(stats=STATS._replace(d2logp=torch.ones(4))),
    r"stats\.dlogp: None, expected a tensor beside stats\.d2logp": dict(
        stats=TokenStats(*token_values(4))._replace(dlogp=None, dentropy=None)
    ),
    r"stats\.dlogp: None, expected a tensor beside stats\.fisher": dict(
        stats=token_values(4, order=0)._replace(fisher=torch.ones(4))
    ),
    r"cu_seqlens: shape \[1, 2\], expected \[S \+ 1\]": dict(cu_seqlens=[[0, 4]]),
    r"cu_seqlens: shape \[0\], expected \[S \+ 1\]": dict(cu_seqlens=[]),
    r"cu_seqlens: dtype float64, expected int32 or int64": dict(cu_seqlens=[0.0, 4.0]),
    r"cu_seqlens: from 1 to 4, expected 0 to 4, the number of tokens": dict(cu_seqlens=[1, 4]),
    r"cu_seqlens: from 0 to 5, expected 0 to 4, the number of tokens": dict(cu_seqlens=[0, 5]),
    r"cu_seqlens\[2\]: 2, expected at least the 3 before it": dict(cu_seqlens=[0, 3, 2, 4]),
    r"group: shape \[1\], expected \[2\], one entry per sequence": dict(group=[0]),
    r"group: dtype float64, expected integers": dict(group=[0.0, 1.0]),
}


@every_implementation
@pytest.mark.parametrize("message", BAD_LOGITS | BAD_IN_BOTH)
def test_bad_input_for_token_stats(implementation, message):
    arguments = dict(logits=Z, targets=Y) | (BAD_LOGITS | BAD_IN_BOTH)[message]
    with pytest.raises(ValueError, match="^" + message):
        implementation.token_stats(**arguments)


@every_implementation
@pytest.mark.parametrize("message", BAD_HEADS | BAD_IN_BOTH)
def test_bad_input_for_linear_token_stats(implementation, message):
    arguments = dict(hidden=H, weight=W, targets=Y) | (BAD_HEADS | BAD_IN_BOTH)[message]
    with pytest.raises(ValueError, match="^" + message):
        implementation.linear_token_stats(**arguments)


@every_implementation
@pytest.mark.parametrize("message", BAD_SUMS)
def test_bad_input_for_sequence_sums(implementation, message):
    arguments = dict(stats=STATS, cu_seqlens=[0, 2, 4]) | BAD_SUMS[message]
    with pytest.raises(ValueError, match="^" + message):
        implementation.sequence_sums(**arguments)


@every_implementation
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", TokenStats._fields)
def test_values_that_are_not_finite_are_named(implementation, name, value):
    stats = token_values(53)
    getattr(stats, name)[[37, 40]] = value
    message = rf"^{name} of rollout 1: {value} at token 17, expected finite numbers$"
    with pytest.raises(ValueError, match=message):
        implementation.sequence_sums(stats, [0, 20, 53])


@every_implementation
def test_finite_values_whose_sum_is_not_are_named(implementation):
    stats = TokenStats(*(torch.full((48,), 1.0, dtype=torch.float64) for _ in range(4)))
    stats.dlogp[8:] = 1e307
    message = r"^dlogp of rollout 1: inf summed over its tokens, expected a finite number$"
    with pytest.raises(ValueError, match=message):
        implementation.sequence_sums(stats, [0, 8, 48])
