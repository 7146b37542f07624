"""The models that run inside the server's Python backend; a rendered `model.py` imports one."""
