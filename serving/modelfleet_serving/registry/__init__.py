"""The registry: replicas report to it, the operator writes routes to it, routers follow its table.

It keeps nothing on disk. After a restart it is filled again by the replicas' heartbeats and the operator's
resync, and says nothing to routers until it has settled.
"""
