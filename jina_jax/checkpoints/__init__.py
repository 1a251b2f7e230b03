"""Checkpoints on disk: finds models, and reads and writes every supported layout."""
