"""What a training will take, computed without its weights."""
