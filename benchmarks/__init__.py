"""Programs that measure the numbers in README and docs, and the modules they share."""
