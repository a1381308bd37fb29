"""Side-by-side measurements, one per stage; LOG.md says what was tried and what came."""
