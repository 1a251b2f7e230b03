"""From files of records to the packed batches of a stage."""
