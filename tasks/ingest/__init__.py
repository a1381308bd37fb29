"""Stage `ingest`: one source of rows, typed and with a manifest."""
