"""The shell of every page: one file, no scripts."""
