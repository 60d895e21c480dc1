"""Drafters, chosen by what the bundle has."""
