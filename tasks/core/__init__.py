"""The foundation of all rooms: errors, whole outputs, the graph of dvc.yaml, a stage's process; no model."""
