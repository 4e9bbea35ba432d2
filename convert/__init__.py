"""Weight conversion, imported as `distrijax.convert`; nothing is public here yet.

Folders of the diffusers layout need no conversion: `distrijax.weights.load` reads them directly.
"""
