"""Pipelines: they load a checkpoint and generate images of prompts."""
