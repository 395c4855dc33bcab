"""How bytes get to another process: sockets, gRPC, TLS, the handshake."""
