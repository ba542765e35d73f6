"""Models: ordinary `nn.Module`s. Needs torch and nothing else."""
