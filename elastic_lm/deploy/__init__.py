"""What a cluster is told to run a run: manifests as plain values, made from a run's config. Starts and asks nothing."""
