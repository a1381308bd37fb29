"""A run around the stages: its workspace, servers, schedule and progress."""
