"""The operator: plans, reconciles and reports ModelDeployments."""
