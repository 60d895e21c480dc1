"""Inputs as broken peers, clients and outsiders send them. ``python -m tests.fuzz`` tries as many as one likes."""
