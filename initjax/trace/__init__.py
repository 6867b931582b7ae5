"""Flax module and example input -> a program of weights with known distributions."""
