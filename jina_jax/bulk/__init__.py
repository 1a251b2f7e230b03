"""Embedding of many files to Parquet shards, restartable and by any number of processes."""
