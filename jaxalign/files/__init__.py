"""Files: readers, one visit of pairs of blocks, one checkpoint format; sigma and grids of what memory does not hold."""
