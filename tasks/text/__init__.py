"""What can be said of a text without a model: words, shared n-grams, patterns, refusals."""
