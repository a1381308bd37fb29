"""What people decide of rows and answers: rows in quarantine, and which of two answers is better."""
