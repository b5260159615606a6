"""What was sampled: the packed batch, the readers of files, and sampling itself.

A policy is used here as it is handed in; nothing else of dentropy is imported but its doors.
"""
