"""A trace of requests through the real scheduler, in simulated time."""
