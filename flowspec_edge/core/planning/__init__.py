"""Who serves which layers, and what that brings."""
