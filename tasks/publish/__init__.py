"""Model cards, and uploads to the hub."""
