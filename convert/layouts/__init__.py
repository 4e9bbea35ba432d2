"""Layouts of checkpoints: tables of names from each to diffusers' folders, and back."""
