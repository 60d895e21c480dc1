"""The machine that serves: it listens, and hosts stages."""
