"""Stages `baseline` and `evaluate`: a model answers what suites ask."""
