"""The model: config, weights, layers, graphs, sampler."""
