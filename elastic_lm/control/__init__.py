"""Decisions: pure code that turns events and a clock into actions. No I/O, no threads, no randomness."""
