"""The mathematics: the operators that the passes put into graphs."""
