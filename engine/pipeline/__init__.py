"""A restoration from photo to photo: the restorer, the host's and the device's way, the denoiser, text."""
