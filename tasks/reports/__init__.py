"""Evaluated items, the statistics over them, and the rows of a training log."""
