"""Presentation of events: metrics, goodput, progress."""
