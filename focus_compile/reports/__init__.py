"""What people read: explanations, measurements, pages."""
