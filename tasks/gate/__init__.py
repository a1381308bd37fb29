"""The decision whether a version may be promoted."""
