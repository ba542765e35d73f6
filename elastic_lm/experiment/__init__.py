"""Runs as experiments: one made of another, all of a store at a glance, two side by side. No ray."""
