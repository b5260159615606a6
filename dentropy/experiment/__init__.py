"""The whole experiment: passes and estimators put together, and what is written and shown of the result.

It may import everything but the command line, the demo and the integrations, which are built on it.
"""
