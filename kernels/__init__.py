"""Triton kernels, installed as `dentropy.kernels`: tensors in, tensors out, nothing checked.

They know no model and import nothing of dentropy.
"""
