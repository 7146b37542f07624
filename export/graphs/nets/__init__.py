"""The networks as torch modules that trace with dynamic sizes."""
