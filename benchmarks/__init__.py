"""Programs that measure the numbers in README, and the modules they share."""
