"""From what is wanted and what is seen to what shall be: pure functions, without clock, network or chance.

The way of one ModelDeployment: :func:`core.reconcile` takes it with the planner's answers and what Ray and
the registry report, and gives the applications, the route and the status that follow.
"""
