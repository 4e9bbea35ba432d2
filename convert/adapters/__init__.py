"""What goes on top of a checkpoint: LoRAs, textual inversions, and parts that replace others."""
