"""Desired against actual: the deployment state machine, its journal and its reconciler."""
