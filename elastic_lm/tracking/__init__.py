"""Copies of a run's metrics in other people's tools, fed from its event log; never in the way of training."""
