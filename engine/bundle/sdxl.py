"""Constants of SDXL that both the graphs and the engine depend on."""

#: Tokens of a chunk of text, the start and the end token included.
TOKENS = 77
#: Original size, crop and target size, as the networks are told whatever the photo's size.
MICRO_CONDITIONS = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)
#: Of every attention head.
HEAD_CHANNELS = 64
