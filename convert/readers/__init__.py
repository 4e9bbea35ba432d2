"""Files of weights: found and read tensor by tensor, never executed."""
