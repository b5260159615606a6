"""What a token and a rollout are worth: log-probabilities, entropies and their derivatives, and their sums.

Arithmetic on tensors; knows no model. It may import `dentropy.kernels` and nothing else of dentropy.
"""
