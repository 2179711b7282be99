"""Methods times seeds on a data set, side by side."""
