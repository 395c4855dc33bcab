"""What a message says: dataclasses without bytes or sockets."""
