"""Torch oracles of the parity tests, and writers of small random checkpoints in published layouts.

Nothing here imports jina_jax: whatever both sides agree on was arrived at twice.
"""
