"""One file per family: presets built from parts, and a block of its own only where the forward really
differs."""
