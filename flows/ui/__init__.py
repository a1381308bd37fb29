"""Pages for a team, beside the API: `temper ui`. Each module is a page; site.py is what they have in common."""
