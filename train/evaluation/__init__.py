"""Embeddings measured on the corpus, and the reports of what was measured."""
