"""Tokenizers and chat templates: from messages to token ids and loss masks."""
