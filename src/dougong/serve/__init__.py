"""A run over HTTP, in the words that existing clients speak."""
