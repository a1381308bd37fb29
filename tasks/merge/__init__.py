"""Stage `merge`: from base and adapter to one model, file to file."""
