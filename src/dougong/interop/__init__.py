"""Models of other formats in and out."""
