"""From source rows to packed token batches."""
