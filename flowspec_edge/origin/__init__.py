"""The machine that asks: it opens a ring over nodes, and writes texts with it."""
