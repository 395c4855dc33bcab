"""Model workers beyond the first: peers, tensor parallelism, pipeline replicas."""
