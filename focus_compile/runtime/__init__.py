"""What runs when a compiled model is called, and the sessions that calls share."""
