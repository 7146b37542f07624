"""Image files in and out, sizes, colour fix and preview."""
