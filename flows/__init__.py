"""Order, schedule and what a person sees."""
