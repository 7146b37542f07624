"""The command line: options, progress, photos in batches, Ray, the report page."""
