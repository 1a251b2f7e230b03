"""Embedding in memory: `Embedder`, its arguments, and the compiled forward passes."""
