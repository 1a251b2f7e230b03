"""MTEB: its tasks from files, without a network, and its leaderboard's table of a run."""
