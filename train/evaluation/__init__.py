"""Evaluation of embeddings on the corpus, and reports of the scores."""
