"""Who belongs together, and how nodes find each other."""
