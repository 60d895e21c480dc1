"""The draft tree, from the tokens that are drafted to the rows that a stage runs."""
