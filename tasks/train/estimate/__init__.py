"""Memory and time of a training, computed without its weights."""
