"""Stage `train`: an adapter by an objective."""
