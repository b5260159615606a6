"""Lines that make a number right, what a mutant has in their place, and the tests that must fail on it.

(file, what stands there once, what the mutant has instead, pytest's arguments)
"""

REFERENCE = ("dentropy/reference.py", "tests/test_reference.py")
PLAIN = ("dentropy/stats/plain.py", "tests/stats/test_plain.py")
MERGE = ("dentropy/stats/plain.py", "tests/stats/test_plain.py -k merge")
SHARDS = ("dentropy/stats/vocabulary_parallel.py", "tests/stats/test_vocabulary_parallel.py")
SUMS = ("dentropy/stats/sequence_sums.py", "tests/stats/test_sequence_sums.py")
MOMENTS = ("kernels/moments.py", "tests/kernels/test_moments.py")
SLOPES = ("dentropy/estimators/slopes.py", "tests/estimators/test_slopes.py")
LEFT_OUT = ("dentropy/estimators/slopes.py", "tests/estimators/test_jackknife.py")
CURVATURES = ("dentropy/estimators/curvatures.py", "tests/estimators/test_curvatures.py")
IMPORTANCE = ("dentropy/estimators/importance_sampling.py", "tests/estimators/test_importance_sampling.py")
PREDICTION = ("dentropy/estimators/prediction.py", "tests/estimators/test_prediction.py")
REWEIGHTING = ("dentropy/estimators/reweighting.py", "tests/estimators/test_another_sampler.py -k Every")
MEANS = ("dentropy/estimators/mean_change.py", "tests/estimators/test_forecasts.py")
BASELINES = ("dentropy/estimators/baselines.py", "tests/estimators/test_forecasts.py")
PASS_AT_K = ("dentropy/estimators/pass_at_k.py", "tests/estimators/test_forecasts.py")
RATES = ("dentropy/estimators/fieller.py", "tests/estimators/test_forecasts.py")
GROUPS = ("dentropy/estimators/groups.py", "tests/estimators/test_groups.py tests/estimators/test_jackknife.py")
FLOOR = ("dentropy/passes/noise_floor.py", "tests/passes/test_noise_floor.py -k carries")
OF_UPDATE = ("dentropy/passes/update_groups.py", "tests/passes/test_update_groups.py")
CROSS_FIT = ("dentropy/passes/cross_fit.py", "tests/passes/test_cross_fit.py")
LOSS = ("dentropy/passes/policy_loss.py", "tests/passes/test_policy_loss.py")
KL_TO = ("dentropy/cli/reference.py", "tests/cli/test_probe.py -k kl_penalty")
PROXIES = ("dentropy/estimators/proxies.py", "tests/estimators/test_proxies.py")
DISCRIMINANT = ("dentropy/passes/mean_discriminant.py", "tests/passes/test_mean_discriminant.py")
COEFFICIENT = ("dentropy/estimators/bonus.py", "tests/estimators/test_bonus.py")
BONUS = ("dentropy/passes/entropy_bonus.py", "tests/passes/test_entropy_bonus.py")
HEAD = ("dentropy/model/head.py", "tests/passes/test_forward_mode.py tests/model/test_exact_pass.py")
ATTENTION = ("dentropy/model/attention_ops.py", "tests/model/test_attention.py")
FORWARD = ("dentropy/passes/forward_mode.py", "tests/passes/test_forward_mode.py")
WALK = ("dentropy/passes/microbatches.py", "tests/passes/test_forward_mode.py")
REVERSE = ("dentropy/passes/reverse_mode.py", "tests/passes/test_reverse_mode.py")
GRADIENT = ("dentropy/passes/policy_gradient.py", "tests/passes/test_policy_gradient.py")
UPDATE_TOKENS = ("dentropy/passes/update_attribution.py", "tests/passes/test_update_attribution.py")
UID = ("dentropy/rollouts/formats/verl.py", "tests/rollouts/test_reading.py")
PADDING = ("dentropy/rollouts/formats/nemo_rl.py", "tests/rollouts/test_reading.py")
TEMPLATE = ("dentropy/rollouts/lost_template.py", "tests/rollouts/test_reading.py")
SAMPLING = ("dentropy/rollouts/sampling.py", "tests/rollouts/test_sampling.py")
PROBE = ("dentropy/experiment/probe.py", "tests/experiment/test_probe.py")
WATCH = ("dentropy/experiment/step_watch.py", "tests/experiment/test_step_watch.py")
MEANT = ("dentropy/model/optimizer_step.py", "tests/experiment/test_step_watch.py")
TRAINER = ("dentropy/integrations/transformers.py", "tests/integrations/test_transformers.py")
SHARDED = ("dentropy/model/fully_sharded.py", "tests/passes/test_fully_sharded.py -k quick")
CUT_HEAD = ("dentropy/passes/reverse_mode.py", "tests/passes/test_tensor_parallel.py -k quick")
IN_STEP = ("dentropy/passes/sharded_gradient.py", "tests/passes/test_fully_sharded.py -k quick")
STORED = ("dentropy/model/sharded.py", "tests/model/test_in_parts.py -k quick")
MERGED = ("dentropy/model/adapters_in_parts.py", "tests/model/test_in_parts.py -k quick")
ELSEWHERE = ("dentropy/passes/forward_mode.py", "tests/model/test_in_parts.py -k quick")
AUTOCAST = ("dentropy/model/float32_copies.py", "tests/integrations/test_transformers.py -k autocast")

_CHANGES = [
    # softcap and temperature
    (REFERENCE, "slope = 1 - t * t", "slope = 1 - t"),
    (REFERENCE, "bend = -2 * t * slope", "bend = 2 * t * slope"),
    (REFERENCE, "slope * ddu + bend * du * du", "slope * ddu"),
    (PLAIN, "torch.mul(u, u, out=scratch).neg_().add_(1.0)", "torch.mul(u, u, out=scratch).neg_().add_(2.0)"),
    (PLAIN, "value=-2.0 / softcap", "value=-1.0 / softcap"),
    (PLAIN, "return (softcap or 1.0) / temperature", "return 1.0 / temperature"),
    (PLAIN, "-scale * covariance", "-covariance"),
    (PLAIN, "variance = scale**2 *", "variance = scale *"),
    (PLAIN, "fisher=scale**2 * variance", "fisher=scale * variance"),
    (HEAD, "temperature=temperature / self.scale", "temperature=temperature"),
    (HEAD, "self.softcap / self.scale", "self.scale / self.softcap"),
    (REVERSE, "dz /= temperature", "dz *= temperature"),
    (REVERSE, "dz.mul_(1 - t * t)", "dz"),
    # merges of shards and segments
    (MERGE, "centre = (share * base).sum(0)", "centre = base[0]"),
    (MERGE, "within * rescale / everything", "within / everything"),
    (MERGE, "spread * rescale / everything", "spread / everything"),
    (MERGE, "highest = top.amax(0)", "highest = top[0]"),
    (SHARDS, "targets - sizes[: dist.get_rank(process_group)]", "targets - sizes[: dist.get_rank(process_group) + 1]"),
    (MOMENTS, "mean_x_b = b.mean_x + shift_b", "mean_x_b = b.mean_x"),
    (MOMENTS, "between = total_a * share_b", "between = total_a * share_a"),
    (MOMENTS, "c_dd_b + between_d * apart_d", "c_dd_b + between_d * apart_x"),
    # sums of what comes later
    (REFERENCE, "h[k + 1 :].sum()", "h[k:].sum()"),
    (SUMS, "- 1.0 - np.arange", "- np.arange"),
    (SUMS, '"entropy_to_go": entropy * first', '"entropy_to_go": entropy * (first + dlogp)'),
    (SUMS, "second = first**2 + sum_before", "second = first**2 - sum_before"),
    # rollouts of another sampler
    (REWEIGHTING, "_exp(sums.logp - sums.sampler_logp", "_exp(sums.sampler_logp - sums.logp"),
    (REWEIGHTING, "token_weights(sums, weights) * np.exp(token_log_ratios(sums))", "token_weights(sums, weights)"),
    # the forecast
    (BASELINES, "others = np.where(alone, of_all, of_group) - own", "others = np.where(alone, of_all, of_group)"),
    (MEANS, "np.exp(found.before) * np.expm1", "np.expm1"),
    (PASS_AT_K, "comb(wrong, k - j)", "comb(wrong, k - 1)"),
    (PASS_AT_K, "wrong - 1, n - 1, k", "wrong, n - 1, k"),
    (RATES, "- t**2 * covariance", "+ t**2 * covariance"),
    # the estimators
    (SLOPES, "(-ratio.mean * dsize, dsize)", "(ratio.mean * dsize, dsize)"),
    (LEFT_OUT, "return (terms - entropy / size * dsize) / size", "return (terms + entropy / size * dsize) / size"),
    (CURVATURES, "ratio.entropy * q, 2 * dlogp * dentropy", "ratio.entropy * q, dlogp * dentropy"),
    (CURVATURES, "q = dlogp**2 + d2logp", "q = dlogp**2 - d2logp"),
    (CURVATURES, "cross = cross - 2 * first.value * dsize", "cross = cross - first.value * dsize"),
    (
        IMPORTANCE,
        'column(moved, "logp", "moved")[rows] - column(as_drawn(base), "logp", "base")',
        'column(as_drawn(base), "logp", "base") - column(moved, "logp", "moved")[rows]',
    ),
    (IMPORTANCE, "rows = paired_rows(base, moved)", "rows = _pair(base, moved) * 0 + np.arange(len(base.rollout))"),
    (
        IMPORTANCE,
        "scaled * (moved_entropy - moved_value * moved_size)",
        "scaled * (moved_entropy - ratio.mean * moved_size)",
    ),
    (PREDICTION, 'terms = {"linear": (eta, first)}', 'terms = {"linear": (-eta, first)}'),
    (PREDICTION, "(eta**2 / 2, second)", "(eta**2, second)"),
    (GROUPS, "return count / (count - 1) * self.sums(influence) ** 2", "return self.sums(influence) ** 2"),
    (GROUPS, "return (self.members / (self.members - 1))[self.row]", "return (self.members / self.members)[self.row]"),
    (GROUPS, "return min(self.dof, degrees_by_spread(terms))", "return self.dof"),
    (FLOOR, "getattr(end.tokens, name).double() - getattr(start", "getattr(start.tokens, name).double() - getattr(end"),
    (
        GROUPS,
        "(count - 1) / count * np.sum((left_out - left_out.mean()) ** 2)",
        "np.sum((left_out - left_out.mean()) ** 2)",
    ),
    # the pass
    (ATTENTION, "(distance >= window)", "(distance > window)"),
    (ATTENTION, "hidden = distance < 0", "hidden = distance < 1"),
    (FORWARD, "torch.add(primal, v, alpha=eta)", "torch.add(primal, v, alpha=-eta)"),
    (WALK, "predicts = batch.generated[places + 1]", "predicts = batch.generated[places]"),
    (WALK, "tokens[places[predicts] + 1]", "tokens[places[predicts]]"),
    (REVERSE, "dz.scatter_add_(-1, at, b", "dz.scatter_add_(-1, at, -b"),
    (SAMPLING, "top_k=0,", "top_k=50,"),
    # the update's own tokens
    (UPDATE_TOKENS, "without_row(parts.gain * torch.ones_like(g), rows[name])", "parts.gain"),
    (UPDATE_TOKENS, "found.dlogp.double() * size", "found.dlogp.double()"),
    (UPDATE_TOKENS, "(portion * (1 - portion))", "portion"),
    (UPDATE_TOKENS, "g[name] - f * gradient.whole(name)", "g[name]"),
    (UPDATE_TOKENS, "np.arange(k * apart, len(batch)", "np.arange(0, len(batch)"),
    # what trainers write
    (UID, 'return uid.rsplit("_", 2)[0]', 'return uid.rsplit("_", 1)[0]'),
    (PADDING, '"token_ids": ids[:n], "loss_mask": kept[:n]', '"token_ids": ids, "loss_mask": kept'),
    (TEMPLATE, "if len(found) == 1:", "if found:"),
    # groups of the update's tokens, proxies of their shares, bonuses
    (OF_UPDATE, "-update.clip_factor * update.parts(name).gain * g", "-update.parts(name).gain * g"),
    (OF_UPDATE, "difference(total, share)", "difference(share, total)"),
    (CROSS_FIT, "others = parts[:k] + parts[k + 1 :]", "others = parts"),
    (CROSS_FIT, "scale * reduce", "reduce"),
    # the KL penalty of a loss
    (LOSS, "-np.expm1(reference - logp)", "np.expm1(logp - reference)"),
    (KL_TO, "tokens.logp.double()", "tokens.entropy.double()"),
    # proxies
    (PROXIES, "p * above - mean_discriminant", "p * above + mean_discriminant"),
    (PROXIES, "np.cumsum(counts) - (counts + total) / 2", "np.cumsum(counts) - (1 + total) / 2"),
    (PROXIES, "(xy - x * y / n) ** 2", "xy**2"),
    (PROXIES, "found = xx - x * x / n", "found = xx"),
    (PROXIES, "proxy.mean() + x / n", "proxy.mean() + x / n.mean()"),
    (PROXIES, "reliability if known", "reliability**0.5 if known"),
    (DISCRIMINANT, "p.square() *", "p *"),
    (COEFFICIENT, "influence=-update.influence", "influence=update.influence"),
    (BONUS, "g / update.clip_factor - coefficient", "g - coefficient"),
    (BONUS, "if not _is_linear(update):", "if False:"),
    # fresh rollouts
    (PROBE, "-base_influence - measured.influence", "-base_influence"),
    (PROBE, "-base_influence - measured.influence", "-base_influence + measured.influence"),
    # sharded weights
    (SHARDED, "g / dist.get_world_size()", "g"),
    (IN_STEP, "run(microbatch, 0.0)", "run(microbatch)"),
    (IN_STEP, "alpha=ranks.count()", "alpha=1"),
    (STORED, "part.narrow(dim, low, high - low)", "part.narrow(dim, 0, high - low)"),
    (MERGED, "laid_out_as(base[name].detach(), p)", "laid_out_as(2 * base[name].detach(), p)"),
    (ELSEWHERE, "as_it_stands(beside(v, parameter))", "as_it_stands(2 * beside(v, parameter))"),
    (CUT_HEAD, "b.masked_fill(~here, 0.0)", "b"),
    # inside a trainer
    (WATCH, "OtherChange(-back.delta", "OtherChange(back.delta"),
    (MEANT, "copied = _in_float32 if in_float32 else", "copied = Tensor.clone if in_float32 else"),
    (TRAINER, "callbacks.insert(0, callback)", "callbacks.append(callback)"),
    (TRAINER, "if buffer is None or buffer is known:", "if buffer is None:"),
    (AUTOCAST, 'own["forward"] = own[ORIGINAL_FORWARD]', "pass"),
]
MUTANTS = [(file, old, new, tests) for (file, tests), old, new in _CHANGES]
