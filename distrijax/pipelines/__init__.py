"""Pipelines: a checkpoint is loaded, and a prompt becomes images."""
