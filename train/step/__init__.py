"""Compiled code of a training step: the loss, its gradient and the update."""
