"""The server: requests of several vendors' schemas, embedded in common batches."""
