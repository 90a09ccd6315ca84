"""One analysis seen as data, picture, cost, files, trace."""
