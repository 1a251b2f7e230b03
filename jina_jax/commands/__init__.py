"""The commands of `jina-jax`, one a file; `cli.py` puts them together."""
