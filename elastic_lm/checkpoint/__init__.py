"""Checkpoints: safetensors parts and a manifest that makes them count."""
