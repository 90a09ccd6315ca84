"""Dynamo's graph -> canonical graph."""
