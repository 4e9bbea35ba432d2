"""Readers of files, layouts of checkpoints, and what goes on top of them; imported as `distrijax.convert`."""
