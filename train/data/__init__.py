"""Turns files of records into the packed batches of a stage."""
