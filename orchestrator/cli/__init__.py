"""The command.

gRPC reads its settings when it is imported: it would tell of forks on stderr, and its fork handlers may abort children that are
about to run another program (Ray's start). Only `autan up`, and the workers that it starts, let gRPC say more than errors on
stderr: it alone knows why a TLS handshake was refused.

pydantic would look for plugins in the metadata of every installed package, in each process that starts.
"""

import sys

from configs.env import set_for_libraries

set_for_libraries({"GRPC_ENABLE_FORK_SUPPORT": "0", "PYDANTIC_DISABLE_PLUGINS": "__all__"})
if sys.argv[1:2] != ["up"]:
    set_for_libraries({"GRPC_VERBOSITY": "ERROR"})
