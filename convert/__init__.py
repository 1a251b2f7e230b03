"""Programs that convert checkpoints between PyTorch and JAX: `python -m convert --help`."""
