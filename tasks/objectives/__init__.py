"""Losses: the maths, with their papers; no files, no config."""
