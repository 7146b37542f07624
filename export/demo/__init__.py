"""The small model that the project ships."""
