"""From texts to packed batches: files of texts, the tokenizer, and rows that hold several texts."""
