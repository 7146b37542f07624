"""Checkpoints as people have them: files, key maps, architecture, LoRAs, tokenizer; torch only for its old format."""
