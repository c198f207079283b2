"""A model divided between processes: which part each holds, and how they compute one step together."""
