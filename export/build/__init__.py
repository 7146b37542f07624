"""A build: request, plan, steps, verification, the command."""
