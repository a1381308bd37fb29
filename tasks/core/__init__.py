"""What everything stands on: errors, whole outputs, the graph of dvc.yaml, a stage's process; no model, no network."""
