"""What MLflow runs when it serves a version."""
