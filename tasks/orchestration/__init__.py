"""Stages as Prefect tasks that run DVC, and the whole of params.yaml."""
