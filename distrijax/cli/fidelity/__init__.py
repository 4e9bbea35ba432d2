"""The parts of `distrijax evaluate`: prompts, grid of settings, metrics, results and figures."""
