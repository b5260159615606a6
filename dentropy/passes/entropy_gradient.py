"""The gradient of the entropy as a direction: what an exact entropy bonus adds to a step."""

from collections.abc import Callable

from dentropy.model.direction import Direction
from dentropy.model.in_place import in_turn
from dentropy.model.policy import Policy
from dentropy.passes.measure import measure
from dentropy.passes.microbatches import AUTO
from dentropy.passes.policy_gradient import trained_parameters
from dentropy.passes.slope_gradient import slope_gradient
from dentropy.rollouts.batch import PackedBatch


@in_turn
def entropy_gradient(
    policy: Policy,
    batch: PackedBatch,
    *,
    estimator: str = "causal",
    per: str = "token",
    token_budget: int | str = AUTO,
    progress: Callable[[int], None] | None = None,
) -> Direction:
    """∇R on these rollouts: its product with any direction is the slope along that, all its terms included.

    The usual bonus differentiates the entropies of the tokens that were sampled, and not what was sampled: it leaves
    out that other tokens would come after, and how many. It takes a plain and a reverse pass.

    Args:
        policy, batch: as in `measure`; `batch` has no need of rewards.
        estimator, per: as in `slope`.
        token_budget, progress: as in `measure`; progress counts the tokens of both passes.

    Returns:
        Direction in nats per token (or sequence) per unit of each weight, at the parameters that an update moves, with
        step_size 1.

    Raises:
        ValueError: as `measure` and `slope` do.

    Example:
        >>> from dentropy import entropy_gradient, measure, sample, slope
        >>> from dentropy.demo.run import load_policy
        >>> policy, tokenizer = load_policy()
        >>> batch = sample(policy, [tokenizer.encode("17=")], per_prompt=4, max_new_tokens=9)
        >>> steepest = entropy_gradient(policy, batch)
        >>> found = slope(measure(policy, batch, steepest)).value
        >>> bool(abs(found - steepest.norm() ** 2) < 1e-3 * found)
        True
    """
    settings = {"token_budget": token_budget, "progress": progress}
    sums = measure(policy, batch, keep_tokens=True, **settings)
    names = list(trained_parameters(policy.model))
    found = slope_gradient(policy, batch, sums, names, estimator=estimator, per=per, **settings)
    return Direction({name: found.whole(name) for name in names})
