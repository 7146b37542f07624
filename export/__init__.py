"""Offline: checkpoints and LoRAs to a bundle. torch is allowed here, and only here."""
