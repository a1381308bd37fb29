"""The page that compares all models of a run."""
