"""Keeps one engine process: guard process, state machine, probes, heartbeats."""
