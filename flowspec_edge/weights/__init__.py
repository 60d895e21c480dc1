"""Weight files: where they lie, how they come here, and how others get them."""
