"""What is compiled: the loss, its gradient and the update of one training step."""
