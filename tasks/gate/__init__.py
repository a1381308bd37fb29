"""Whether a version may be promoted."""
