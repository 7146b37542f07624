"""NVIDIA's driver, TensorRT and ONNX Runtime's CUDA provider, played on the host for tests of the GPU path.

`driver/` is a `libcuda.so.1`. The real `cuda.core` and NVRTC run on it, so all of `engine.device.cuda` does.
TensorRT-RTX's builder is the real one; its runtime, TensorRT's, and ONNX Runtime's CUDA provider are played by ONNX
Runtime's CPU provider on the driver's memory and streams, and hold callers to what their documentation says
(`played_tensorrt`, `played_onnxruntime`). `plugin` puts all of that into a process of pytest, which must be one of
its own.

It cannot show what TensorRT's runtime and NVIDIA's kernels really do, nor how long anything takes.

    python tests/gpu_stand_in                      all scenarios, and tests/gpu
    python tests/gpu_stand_in -k faults --slow     as pytest takes it
"""
