"""What a run would take, told without its devices: traffic, memory, overlap and projected time."""
