"""Models on disk: every layout that is read or written, and where a model is found."""
