"""Preference optimisation of language models, with the reference policy as the thing under study."""

import os

# Threads that wait by spinning slow each other down several times over as soon as another process uses a core. Read by
# the OpenMP runtime when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
