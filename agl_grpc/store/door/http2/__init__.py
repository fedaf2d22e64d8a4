"""gRPC over HTTP/2 on the store's own event loop: no thread, no hand-over between socket and handler.

A handler runs on the loop that read its request, and what is answered in one turn of the loop leaves in one
write. Handlers are what `grpc` calls RpcMethodHandlers, so any generated servicer can be served.
"""

from __future__ import annotations
