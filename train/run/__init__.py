"""Driver of the training step: the loop, its checkpoints, its metrics and the initial model."""
