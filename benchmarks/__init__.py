"""What the numbers in README come from; each module is a program."""
