"""What board this is, and how hot."""
