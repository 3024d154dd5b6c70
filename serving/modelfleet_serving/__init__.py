"""The data plane: engines, replicas, registry, router and simulator."""
