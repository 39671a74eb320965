"""Measurements: accuracy on drawn scenes, what savings and gate are worth, the crop kernel; dated results."""
