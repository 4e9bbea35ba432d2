"""Devices: the mesh, how an image lies on it, what devices exchange, and the programs that run there."""
