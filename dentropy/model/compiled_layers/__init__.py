"""Experimental: decoder layers compiled together with their tangents. No gain has been recorded yet.

It may import `dentropy.model.attention` and `dentropy.model.memory`; only `Policy` imports it, when asked for.
"""
