"""Networks for molecules: features, encoders and planted tasks."""
