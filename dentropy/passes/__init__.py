"""What runs a model over a batch of rollouts, forward or in reverse, and leaves a table or a gradient.

It may import `dentropy.model`, `dentropy.rollouts`, `dentropy.estimators` and `dentropy.stats`.
"""
