"""Torch oracles for the parity tests, and writers of small random checkpoints in every published layout.

Nothing here imports jina_jax: whatever both sides agree on was arrived at twice.
"""
