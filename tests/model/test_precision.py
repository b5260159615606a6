"""What float32 means in a pass, and what bf16 weights cost."""

import numpy as np
import pytest
import torch
from models import CONFIGS, random_batch, random_direction, random_model
from torch.backends import cuda, cudnn, mkldnn

from dentropy import Policy, measure, slope
from dentropy.demo.run import POLICY, draw_rollouts, load_policy
from dentropy.model.packed_row import PackedRow
from dentropy.model.precision import full_float32
from dentropy.passes.policy_gradient import policy_gradient_direction

KINDS = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)


def settings() -> list[str]:
    """Everything PyTorch reports about float32, through both of its interfaces."""

    def read(older):
        try:
            return older()
        except RuntimeError:  # the newer interface alone was used: not to be read through the older one
            return "mixed"

    older = (torch.get_float32_matmul_precision, lambda: cuda.matmul.allow_tf32, lambda: cudnn.allow_tf32)
    return [*map(read, older), *(place.fp32_precision for place in (torch.backends, cudnn, mkldnn, *KINDS))]


@pytest.fixture
def pristine():
    """As PyTorch starts, before and after: the fields on top first, since others may inherit from them."""

    def reset():
        for place in (torch.backends, cudnn, mkldnn):
            place.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = True
        for kind in (cuda.matmul, mkldnn.matmul, mkldnn.conv, mkldnn.rnn):
            kind.fp32_precision = "none"

    reset()
    start = settings()
    yield
    reset()
    assert settings() == start


@pytest.mark.parametrize(
    "user",
    [
        "pass",
        "torch.set_float32_matmul_precision('high')",
        "torch.set_float32_matmul_precision('medium')",
        "cuda.matmul.allow_tf32 = True",
        "cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
        "mkldnn.matmul.fp32_precision = 'bf16'",
        "mkldnn.fp32_precision = 'bf16'",
        "cudnn.fp32_precision = 'tf32'",
        "cudnn.conv.fp32_precision = 'ieee'",
        "cudnn.allow_tf32 = False",
        "torch.set_float32_matmul_precision('high'); cuda.matmul.allow_tf32 = False",
    ],
)
def test_float32_is_float32_inside_and_what_was_set_comes_back(pristine, user):
    exec(user)
    before = settings()
    with full_float32():
        assert torch.get_float32_matmul_precision() == "highest" and not cuda.matmul.allow_tf32 and not cudnn.allow_tf32
        assert {kind.fp32_precision for kind in KINDS} == {"ieee"}
    assert settings() == before
    with pytest.raises(KeyError, match="inside"), full_float32():
        raise KeyError("inside")
    assert settings() == before


@pytest.mark.parametrize("request_", [dict(), dict(eta=0.1), dict(order=2, second_order="nested")])
def test_every_pass_runs_in_float32(pristine, request_):
    model = random_model("llama")
    policy, seen = Policy(model), set()
    torch.set_float32_matmul_precision("high")
    before = settings()
    model.model.register_forward_pre_hook(lambda *_: seen.update(kind.fp32_precision for kind in KINDS))
    measure(policy, random_batch(), random_direction(model), **request_)
    assert seen == {"ieee"} and settings() == before


def test_a_setting_that_does_not_hold_is_told(pristine, monkeypatch):
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr("dentropy.model.precision._set", lambda *_: None)
    said = "asked for 'highest', False and 'ieee', PyTorch reports .'high', True"
    with pytest.raises(RuntimeError, match=said), full_float32():
        pytest.fail("a pass began")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a GPU's")
def test_products_on_a_gpu_keep_every_bit(pristine):
    """1 + 2⁻¹² is a float32, and 1 in TF32."""
    x, one = torch.full((256, 256), 1 + 2**-12, device="cuda"), torch.eye(256, device="cuda")
    torch.set_float32_matmul_precision("high")
    rounded = x @ one
    with full_float32():
        assert torch.equal(x @ one, x)
    assert torch.equal(x @ one, rounded) and not torch.equal(rounded, x)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mamba2"])
def test_bf16_policies_pack_and_split_their_head(name):
    policy = Policy(random_model(name).to(torch.bfloat16))
    assert policy.packs and policy.splits_head


def test_logits_of_bf16_weights_are_never_rounded():
    """logp and entropy are those of float64 products of the bf16 hidden states and head."""
    policy, batch = Policy(random_model("llama").to(torch.bfloat16)), random_batch()
    sums = measure(policy, batch, random_direction(policy.model), keep_tokens=True)
    assert {x.dtype for x in sums.tokens if x is not None} == {torch.float32}
    for i in range(len(batch)):
        ids, first = torch.tensor(batch.prompt(i) + batch.response(i)), len(batch.prompt(i)) - 1
        rows = np.arange(first, len(ids) - 1)
        row = PackedRow.of(ids.numpy(), np.array([len(ids)]), rows, ids.numpy()[rows + 1], policy.device)
        with policy.ready(), torch.no_grad():
            hidden, _ = policy.outputs(row)
        logp = torch.log_softmax(hidden.double() @ policy.model.lm_head.weight.double().T, -1)
        assert sums.logp[i] == pytest.approx(float(logp.gather(1, ids[first + 1 :, None]).sum()), rel=1e-5, abs=1e-5)
        assert sums.entropy[i] == pytest.approx(float(-(logp.exp() * logp).sum()), rel=1e-5, abs=1e-5)


def test_bf16_changes_slopes_by_a_fraction_of_their_error_bars():
    """On the demo's policy, a tenth: over 4,096 rollouts as over 192, since a rollout's rounding is its own."""
    policy, tokenizer = load_policy()
    rollouts, update = (draw_rollouts(policy, tokenizer, n_prompts=24, per_prompt=8, seed=seed) for seed in (0, 1))
    direction = policy_gradient_direction(policy, update, step_size=1e-4)
    single = measure(policy, rollouts, direction)
    half = measure(Policy.from_pretrained(POLICY, dtype=torch.bfloat16, device="cpu"), rollouts, direction)
    for estimator in ("causal", "exact", "mixed"):
        a, b = slope(single, estimator=estimator), slope(half, estimator=estimator)
        assert 0 < abs(b.value - a.value) < 0.25 * a.stderr
        assert b.stderr == pytest.approx(a.stderr, rel=0.05)
    np.testing.assert_allclose(half.entropy.sum(), single.entropy.sum(), rtol=1e-3)
