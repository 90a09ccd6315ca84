"""Tests of the project itself: layers, tiers, documents, private names."""
