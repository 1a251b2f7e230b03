"""What drives a step: the loop, its checkpoints, its metrics and the model it starts from."""
