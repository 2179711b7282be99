"""What group steps cost in joint steps, measured on a model."""
