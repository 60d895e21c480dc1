"""HTTP for people and programs: one module per dialect."""
