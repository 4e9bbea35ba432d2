"""`distrijax generate` from a checkout.

python examples/generate.py --devices 8 --prompt "a small green star in the center, on a dotted pink background"
"""

from distrijax.cli.start import run

if __name__ == "__main__":
    run("distrijax.cli.generate", several=True)
