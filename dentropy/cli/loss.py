"""The options of `dentropy probe` that say which loss --update-rollouts minimize; named as `PolicyLoss` names them."""

from __future__ import annotations

OPTIONS = ("average", "max_length", "clip", "ratio", "kl", "entropy_bonus")


def add(command) -> None:
    command.add_argument(
        "--loss-average", metavar="token|sequence|prompt|length", help="what it is the mean over (default: token)"
    )
    command.add_argument("--loss-max-length", type=float, metavar="L", help="the length of --loss-average length")
    command.add_argument(
        "--loss-clip",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="how far below and above 1 ratios to the sampler's log-probabilities in the file are clipped",
    )
    command.add_argument("--loss-ratio", metavar="token|sequence", help="that of a token, or its mean over the rollout")
    command.add_argument(
        "--loss-kl",
        type=float,
        metavar="C",
        help="the coefficient of a KL penalty, per token exp(ref − logp) − (ref − logp) − 1 (beta of TRL; of "
        "verl with low_var_kl)",
    )
    command.add_argument(
        "--loss-kl-reference", metavar="DIR_OR_ID", help="the model that it is to, for a pass over --update-rollouts"
    )
    command.add_argument("--loss-entropy-bonus", type=float, metavar="C", help="the coefficient of an entropy bonus")


def given(options) -> dict:
    """Those that were given, by `PolicyLoss`'s names."""
    found = {name: getattr(options, f"loss_{name}") for name in OPTIONS}
    return {name: value for name, value in found.items() if value is not None}


def check(options) -> None:
    """ValueError where the options are no loss, whatever the rollouts."""
    found, reference = given(options), options.loss_kl_reference
    if options.update_rollouts is None and (found or reference is not None):
        raise ValueError("--loss-average and the other options of the loss: only with --update-rollouts")
    if found.get("kl") and reference is None:
        raise ValueError(f"--loss-kl: {found['kl']:g} without --loss-kl-reference, expected the model that it is to")
    if reference is not None and not found.get("kl"):
        raise ValueError("--loss-kl-reference: without a coefficient, expected one in --loss-kl")
    _loss(found | {"reference_logp": ()})


def of_update(options, update, reference_logp=None):
    """The PolicyLoss of rollouts `update`, whose tokens have these log-probabilities under the reference.

    Raises:
        ValueError: Where it is none, or has ratios and the file no log-probabilities that they are to.
    """
    found = given(options) | {"reference_logp": reference_logp}
    ratios = [f"--loss-{name}" for name in ("clip", "ratio") if name in found]
    if ratios and update.sampler_logp is None:
        raise ValueError(
            f"{ratios[0]}: the rollouts have no log-probabilities of the policy that sampled them, expected them in "
            "sampler_logp (without them every ratio is 1)"
        )
    if ratios:
        found["old_logp"] = update.sampler_logp
    return _loss(found)


def _loss(settings: dict):
    from dentropy.passes.policy_loss import PolicyLoss

    try:
        return PolicyLoss(**settings)
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise ValueError(f"--loss-{name.replace('_', '-')}:{rest}") from error
