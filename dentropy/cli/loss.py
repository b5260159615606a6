"""The options of `dentropy probe` that say which loss --update-rollouts minimize; named as `PolicyLoss` names them."""

from __future__ import annotations

OPTIONS = ("average", "max_length", "clip", "ratio", "entropy_bonus")


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
    command.add_argument("--loss-entropy-bonus", type=float, metavar="C", help="the coefficient of an entropy bonus")


def given(options) -> dict:
    """Those that were given, by `PolicyLoss`'s names."""
    found = {name: getattr(options, f"loss_{name}") for name in OPTIONS}
    return {name: value for name, value in found.items() if value is not None}


def of_update(options, update):
    """The PolicyLoss of rollouts `update`.

    Raises:
        ValueError: Where it is none, or has ratios and the file no log-probabilities that they are to.
    """
    from dentropy.passes.policy_loss import PolicyLoss

    found = given(options)
    ratios = [f"--loss-{name}" for name in ("clip", "ratio") if name in found]
    if ratios and update.sampler_logp is None:
        raise ValueError(
            f"{ratios[0]}: the rollouts have no log-probabilities of the policy that sampled them, expected them in "
            "sampler_logp (without them every ratio is 1)"
        )
    if ratios:
        found["old_logp"] = update.sampler_logp
    try:
        return PolicyLoss(**found)
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise ValueError(f"--loss-{name.replace('_', '-')}:{rest}") from error
