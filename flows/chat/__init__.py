"""Asking models from the command line, several adapters on one base."""
