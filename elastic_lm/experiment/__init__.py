"""Runs as experiments: one made of another. No ray."""
