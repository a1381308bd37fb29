"""Every architecture that transformers has for text, in its smallest random form, through all that temper does."""
