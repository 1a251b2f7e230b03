"""A new adapter for the user's own task: the table's columns, defaults, scores and report."""
