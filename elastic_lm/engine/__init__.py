"""The step path: needs torch and nothing else, so it runs alone wherever torch is installed."""
