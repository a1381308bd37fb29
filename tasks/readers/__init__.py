"""Files of rows in every form that people keep them: JSON, CSV, Parquet, Arrow, text, packed or not."""
