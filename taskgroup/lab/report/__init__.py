"""What a run looks like: pictures, and a display while it goes on."""
