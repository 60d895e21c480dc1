"""Trains the demo model: text, target, draft head, figures. ``python -m exporter.train_demo`` is the way in."""
