"""The only I/O of the operator: Ray, the registry, the API server, model hubs."""
