"""All of Ray: attention workers, model workers and the engine as actors, and the connection to a cluster."""
