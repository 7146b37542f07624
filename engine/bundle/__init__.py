"""The folder that export writes and the engine reads: its manifest, graphs' shapes, hashes, storage."""
