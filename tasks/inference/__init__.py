"""Forward passes: log-probabilities, generation, chat."""
