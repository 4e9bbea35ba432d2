"""Cost of a run without its devices: traffic, memory, communication/compute overlap, projected time."""
