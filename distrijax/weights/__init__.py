"""Checkpoints to arrays: files, names, the hub, and how parameters lie on the mesh."""
