"""Training steps compiled ahead of time for TPUs that are not at hand."""
