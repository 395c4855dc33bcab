"""Machines of the same network that give a server their memory: found, compared by a code, accepted, and back by
themselves after a restart."""
