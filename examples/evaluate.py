"""`distrijax evaluate` from a checkout.

python examples/evaluate.py --devices 1 8 --prompts 16
"""

from distrijax.cli.start import run

if __name__ == "__main__":
    run("distrijax.cli.evaluate")
