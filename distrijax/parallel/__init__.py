"""Devices: the mesh, the layout of an image on it, what devices exchange, and compiled programs."""
