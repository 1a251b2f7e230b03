"""Runs as Python files.

Each has `get_config()`, and a docstring that says how to start it, what of it is in the paper, and
what to expect.
"""
