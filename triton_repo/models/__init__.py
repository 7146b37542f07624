"""The models that run inside the server's Python backend; a rendered `model.py` imports one."""

import resource

# The server bounds its files for the sake of shared memory (`triton_repo.server`); models write caches of any size.
_, _hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (_hard, _hard))
