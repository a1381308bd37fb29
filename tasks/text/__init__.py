"""Features of texts that need no model: words, shared n-grams, patterns, refusals."""
