"""What the embedded model is trained with: scenes with real artwork, their captions, and the parts of the training."""
