"""Runs as Python files: each has `get_config()`, and says how it is started and what of it is not in the paper."""
