"""What fits in memory: this computer's, plans by size, which graphs stay, the VAE in slices."""
