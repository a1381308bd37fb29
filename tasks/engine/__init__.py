"""The training loop: steps, checkpoints, several processes, evaluation on the way."""
