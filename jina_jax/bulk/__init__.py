"""Embeds many files to Parquet shards, restartable and with any number of processes."""
