"""Training of LoRAs: on anybody's checkpoint and pictures, and in the demo's training."""
