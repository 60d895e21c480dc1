"""What to fetch from whom, and what to evict."""
