"""Measurements: accuracy on drawn scenes, the crop kernel against its peers; dated results in results/."""
