"""Device, precision, seeds and collectives."""
