"""From checkpoints to arrays: the hub, files, names of parameters, and how parameters are placed on the mesh."""
