"""What touches a model's inside: the policy, its self-check, directions in its weights, attention with tangents.

It may import `dentropy.stats`, and nothing else of dentropy.
"""
