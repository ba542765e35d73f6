"""The run's truth: what happened, in order, as an append-only log in storage."""
