"""Features in files: readers, checkpoints, and sigma and grids computed from blocks of rows."""
