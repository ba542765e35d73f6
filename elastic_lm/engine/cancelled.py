"""How every wait of a member ends when its generation is over."""

from __future__ import annotations


class Cancelled(Exception):
    """The coordinator fenced this generation."""
