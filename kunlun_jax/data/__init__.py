"""Data sets as columnar samples, and the pipeline that cuts batches from them."""
