"""The parts of examples/evaluate.py: grid, prompts, results, metrics, figures."""
