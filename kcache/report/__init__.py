"""Reports that one can open, mail and keep: a run or a cache as one HTML file."""
