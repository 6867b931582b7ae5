"""The demonstration: predict which initializations of a deep network can be trained, then train it on real images."""
