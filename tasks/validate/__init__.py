"""Stage `validate`: rows are checked; what fails goes to quarantine with its reason."""
