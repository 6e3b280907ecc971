"""A gRPC server for asyncio with the interface of grpcio's: handlers, interceptors and generated code do
not know in which of the two they run. Everything happens in the event loop's thread, so that a message of a
stream costs half of the processor time (docs/decisions.md).

gRPC over HTTP/2 after https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md; HTTP/2 is the library
h2's.
"""

from services.core.http2.server import Server

__all__ = ["Server"]
