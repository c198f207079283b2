"""A run over HTTP, in the words that existing clients speak; and the page to talk to it."""
