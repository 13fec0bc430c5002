"""Requests through the graph of stages: admission, order, edges and streams, budgets. Pure state machines."""
