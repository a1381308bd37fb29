"""Stage `render`: from rows to token ids and loss masks."""
