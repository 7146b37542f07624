"""TensorRT plans: profiles, compilation, the audit of precisions."""
