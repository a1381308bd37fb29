"""Stage `register`: a version in the registry with its evidence."""
