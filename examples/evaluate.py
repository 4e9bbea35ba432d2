"""`distrijax evaluate` from a checkout.

python examples/evaluate.py --devices 1 8 --prompts 16
"""

from distrijax.cli.evaluate import main
from distrijax.cli.options import run

if __name__ == "__main__":
    run(main)
