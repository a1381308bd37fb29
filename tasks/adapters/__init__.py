"""Ways to change a model with few parameters: the maths, with their papers; no files, no config."""
