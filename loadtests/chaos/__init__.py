"""Soak and chaos: many requests, most of them good and the others as bad as can be, against a real server.

`python -m loadtests.chaos --help` says what it shows.
"""

import os

# Read when gRPC is imported: its core would write of every connection that is closed in its turn.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
