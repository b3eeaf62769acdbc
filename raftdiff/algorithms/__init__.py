"""The algorithms, one short file each: how scored samples become a training set, and a training set a loss."""
