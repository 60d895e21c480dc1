"""What a user types and sees: the only home of argparse and of print."""
