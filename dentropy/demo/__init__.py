"""The demo: a small policy that comes with the package, its task, and the experiment on it.

It may import everything but the command line.
"""
