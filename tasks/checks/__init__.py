"""What is known of rows without a model: facts, duplicates, leaks, repairs. No files, no config."""
