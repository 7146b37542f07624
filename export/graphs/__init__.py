"""Networks as ONNX graphs: definitions, traces that ship, tracing with torch, the VAE's segments."""
