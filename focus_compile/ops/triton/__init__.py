"""The mathematics on a GPU."""
